/** The subgraph as SVG: every colour and font is an attribute, so that the drawing is complete when it is saved as a file. */

/**
 * Draws a subgraph into three groups of an SVG: links, numbers beside them, and boxes.
 * @param view `{data, state, palette, subgraph, at, chosen}`: `at(box)` is the middle of a box
 */
function drawSubgraph([links, , boxes], view) {
  const {subgraph} = view;
  const largest = Math.max(...subgraph.links.map(({share}) => Math.abs(share)), 1e-9);
  links.replaceChildren(...subgraph.links.map((link) => drawLink(view, link, Math.sqrt(Math.abs(link.share) / largest))));
  boxes.replaceChildren(...subgraph.boxes.map((box, number) => drawBox(view, box, number)));
}

/** Lets the links of one box stand out and say their shares; -1 for none. */
function focusLinks([links, numbers], view, focus) {
  const near = view.subgraph.links.filter(({from, to}) => from === focus || to === focus);
  view.subgraph.links.forEach((link, at) => links.children[at].setAttribute("opacity", focus < 0 || near.includes(link) ? 1 : 0.1));
  numbers.replaceChildren(...near.map((link) => drawNumber(view, link)));
}

function drawLink({data, state, palette, subgraph, at}, link, size) {
  const points = linkPoints(at(link.from), at(link.to), subgraph.boxes[link.from], subgraph.boxes[link.to]);
  const colour = link.weight < 0 ? palette.lower : palette.raise;
  const name = (box) => boxName(data, state, subgraph.boxes[box]);
  const title = `${name(link.from)} → ${name(link.to)}\nshare of its input ${signedShare(link.share)} (weights ${formatNumber(link.weight, {sign: true})} from ${countOf(link.count, "edge")})\ncarries ${formatShare(link.influence)} of the output`;
  const curve = `M${points[0]} ${points[1]}C${points.slice(2).join(" ")}`;
  return makeSvg("g", {class: "link", "data-from": subgraph.boxes[link.from].key, "data-to": subgraph.boxes[link.to].key},
    makeSvg("title", {}, title),
    makeSvg("g", {opacity: 0.3 + 0.65 * size},
      makeSvg("path", {d: curve, fill: "none", stroke: colour, "stroke-width": 0.8 + 4.2 * size, "stroke-dasharray": link.weight < 0 ? "5 3" : null}),
      makeSvg("path", {d: arrowHead(points, 3.5 + 3 * size), fill: colour})),
    makeSvg("path", {d: curve, fill: "none", stroke: "transparent", "stroke-width": 10, class: "hit"}));
}

/** Bezier points from the top of the source to the bottom of the target, or between their sides where it is not above. */
function linkPoints(from, to, source, target) {
  const [low, high, half, toHalf] = [boxHeight(source) / 2, boxHeight(target) / 2, source.width / 2, target.width / 2];
  const [y1, y2] = [from.y - low, to.y + high];
  if (y1 - y2 > 4) {
    const rise = Math.max(14, (y1 - y2) * 0.45);
    const x1 = from.x + clamp((to.x - from.x) * 0.12, -half * 0.7, half * 0.7);
    const x2 = to.x + clamp((from.x - to.x) * 0.12, -toHalf * 0.7, toHalf * 0.7);
    return [x1, y1, x1, y1 - rise, x2, y2 + rise + 4, x2, y2 + 4];
  }
  const side = to.x >= from.x ? 1 : -1;
  const [x1, x2] = [from.x + side * half, to.x - side * (toHalf + 4)];
  const bow = Math.max(20, Math.abs(x2 - x1) * 0.4);
  return [x1, from.y, x1 + side * bow, from.y - 12, x2 - side * bow, to.y - 12, x2, to.y];
}

function arrowHead(points, size) {
  const [cx, cy, x, y] = points.slice(4);
  const length = Math.hypot(x - cx, y - cy) || 1;
  const [dx, dy] = [(x - cx) / length, (y - cy) / length];
  const [tx, ty] = [x + dx * 4, y + dy * 4];
  const corner = (side) => `${tx - dx * size * 1.6 - dy * size * side} ${ty - dy * size * 1.6 + dx * size * side}`;
  return `M${tx} ${ty}L${corner(0.8)}L${corner(-0.8)}Z`;
}

/** The share of a link, at the middle of its curve. */
function drawNumber({palette, subgraph, at}, link) {
  const [x1, y1, x2, y2, x3, y3, x4, y4] = linkPoints(at(link.from), at(link.to), subgraph.boxes[link.from], subgraph.boxes[link.to]);
  const middle = (a, b, c, d) => (a + 3 * b + 3 * c + d) / 8;
  return svgText(signedShare(link.share), middle(x1, x2, x3, x4), middle(y1, y2, y3, y4), {size: 10.5, bold: true, anchor: "middle", colour: palette.ink, halo: palette.background});
}

function svgText(text, x, y, {size, colour, anchor = "start", bold = false, halo = null}) {
  return makeSvg("text", {
    x, y, "font-size": size, "font-family": FONT, fill: colour, "text-anchor": anchor, "dominant-baseline": "central", "font-weight": bold ? 600 : 400,
    "pointer-events": "none", ...(halo ? {stroke: halo, "stroke-width": 3, "paint-order": "stroke", "stroke-linejoin": "round"} : {}),
  }, text);
}

/** What stands below the name of a box. */
function boxPlace(data, {group, nodes, isOpen}) {
  return group ? `${countOf(nodes.length, "node")}${isOpen ? "" : " ▸"}` : placeOf(data, nodes[0]);
}

/** What a box is called. */
function boxName(data, state, {group, nodes}) {
  return group ? group.name : labelOf(data, state, nodes[0]);
}

function drawBox(view, box, number) {
  const {data, state, palette, at, chosen} = view;
  const {group, nodes, isOpen, width} = box;
  const [{x, y}, height, name] = [at(number), boxHeight(box), boxName(data, state, box)];
  const [left, top] = [x - width / 2, y - height / 2];
  const isSelected = nodes.includes(state.selected);
  const usual = {[KIND.error]: palette.error, [KIND.logit]: palette.logit, [KIND.token]: palette.token, [KIND.position]: palette.token}[data.nodes.kind[nodes[0]]];
  const outline = chosen.has(box.key) || isSelected ? palette.accent : group ? palette.ink : palette.outline;
  const place = boxPlace(data, box);
  const icon = group ? null : pathOfShape(shapeOf(data, nodes[0]), left + 11, top + BOX.height / 2, 4.5);
  const textLeft = left + (icon ? 21 : 10);
  const room = width - (textLeft - left) - 6;
  const result = makeSvg("g", {class: "box", tabindex: -1, role: "button", "data-key": box.key, "aria-pressed": chosen.has(box.key), "aria-label": `${name}, ${place}`},
    makeSvg("title", {}, `${name}\n${group ? nodes.map((node) => labelOf(data, state, node)).join("\n") : place}`));
  if (group) result.append(rectangle(left + 3, top - 3, width, height, {fill: palette.band, stroke: outline, "stroke-width": 1}));
  result.append(rectangle(left, top, width, height, {fill: (!group && usual) || palette.background, stroke: outline, "stroke-width": chosen.has(box.key) || isSelected ? 2.2 : group ? 1.4 : 1}));
  if (icon) result.append(makeSvg("path", {d: icon, fill: palette.neutral, stroke: palette.ink, "stroke-width": 1.1}));
  const bold = Boolean(group);
  result.append(
    svgText(fitText(name, room, 11.5, bold), textLeft, top + 12, {size: 11.5, bold, colour: palette.ink}),
    svgText(fitText(place, room, 9.5), textLeft, top + 25, {size: 9.5, colour: palette.soft}));
  if (isOpen) result.append(...memberLines(view, box, left, top + BOX.height));
  return result;
}

function rectangle(x, y, width, height, style) {
  return makeSvg("rect", {x, y, width, height, rx: 6, ...style});
}

/** The outline of a node's shape as an SVG path. */
function pathOfShape(kind, x, y, radius) {
  const corners = cornersOf(kind, x, y, radius);
  if (corners) return `M${corners.map((corner) => corner.join(" ")).join("L")}Z`;
  return `M${x - radius} ${y}a${radius} ${radius} 0 1 0 ${2 * radius} 0a${radius} ${radius} 0 1 0 ${-2 * radius} 0Z`;
}

function memberLines({data, state, palette}, {nodes}, left, top) {
  const listed = nodes.slice(0, BOX.most).map((node, line) => {
    const member = makeSvg("g", {class: "member", "data-node": node, role: "button", "aria-label": labelOf(data, state, node)},
      makeSvg("rect", {x: left + 4, y: top + line * BOX.member, width: BOX.widest - 8, height: BOX.member, rx: 3, fill: node === state.selected ? palette.neutral : "transparent"}),
      svgText(fitText(`${labelOf(data, state, node)} · ${placeOf(data, node)}`, BOX.widest - 20, 9.5), left + 10, top + (line + 0.5) * BOX.member, {size: 9.5, colour: palette.ink}));
    return member;
  });
  if (nodes.length > BOX.most) listed.push(svgText(`and ${nodes.length - BOX.most} more`, left + 10, top + (BOX.most + 0.5) * BOX.member, {size: 9.5, colour: palette.soft}));
  return listed;
}
