/** Pictures to keep: the graph pane and the subgraph as SVG, which is text and complete in itself, and as PNG. */

const PIXELS = 2; // of a PNG per pixel of the screen

function escapeXml(text) {
  const plain = String(text).replace(/[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, "");
  return plain.replace(/[&<>"]/g, (character) => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})[character]);
}

/** A pen as in drawing.js whose strokes become SVG; `markup()` is all of it so far. */
function createSvgPen() {
  const parts = [];
  const number = (value) => Number(value.toFixed(2));
  const put = (tag, fields, content = null) => {
    const attributes = Object.entries(fields).filter(([, value]) => value !== null && value !== undefined);
    const head = `<${tag}${attributes.map(([name, value]) => ` ${name}="${escapeXml(typeof value === "number" ? number(value) : value)}"`).join("")}`;
    parts.push(content === null ? `${head}/>` : `${head}>${escapeXml(content)}</${tag}>`);
  };
  const paint = ({stroke, fill, width = 1, alpha = 1, dashed}) => ({
    fill: fill ?? "none", stroke: stroke ?? null, "stroke-width": stroke ? width : null, "stroke-dasharray": dashed ? "3 2.5" : null, opacity: alpha < 1 ? alpha : null,
  });
  return {
    curve: ([x, y, ...rest], style) => put("path", {d: `M${number(x)} ${number(y)}C${rest.map(number).join(" ")}`, ...paint(style)}),
    shape: (kind, x, y, radius, style) => put("path", {d: pathOfShape(kind, number(x), number(y), number(radius)), ...paint(style)}),
    box: (x, y, width, height, style) => put("rect", {x, y, width, height, ...paint(style)}),
    text(string, x, y, {colour, size = 11, align = "left", angle = 0, bold = false, halo = null}) {
      put("text", {
        x, y, fill: colour, "font-size": size, "font-family": FONT, "font-weight": bold ? 600 : null, "dominant-baseline": "central",
        "text-anchor": {left: "start", center: "middle", right: "end"}[align], transform: angle ? `rotate(${number((angle * 180) / Math.PI)} ${number(x)} ${number(y)})` : null,
        stroke: halo, "stroke-width": halo ? 3 : null, "stroke-linejoin": halo ? "round" : null, "paint-order": halo ? "stroke" : null,
      }, string);
    },
    /** What `draw` draws, moved aside and cut off at a rectangle. */
    inside(x, y, width, height, draw) {
      const id = `area-${parts.length}`;
      parts.push(`<clipPath id="${id}"><rect width="${width}" height="${height}"/></clipPath><g transform="translate(${x} ${y})" clip-path="url(#${id})">`);
      draw();
      parts.push("</g>");
    },
    markup: () => parts.join("\n"),
  };
}

function svgFile(width, height, background, content) {
  return `<?xml version="1.0" encoding="UTF-8"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="${Math.ceil(width)}" height="${Math.ceil(height)}" viewBox="0 0 ${width} ${height}">\n<rect width="100%" height="100%" fill="${background}"/>\n${content}\n</svg>\n`;
}

/** The graph pane as it is seen, and a line that says what it does not show. */
function graphPicture(data, store, services) {
  const {scene, frame} = services.graph.view();
  const {palette} = scene;
  const pen = createSvgPen();
  pen.inside(frame.axes.left, 0, frame.width, frame.outerHeight, () => drawScene(pen, scene, frame));
  drawAxes(pen, {...scene, state: store.state}, frame);
  const {hidden, share} = scene.visible;
  const {replacement, completeness} = data.scores;
  const caption = [
    `replacement ${replacement.toFixed(3)}, completeness ${completeness.toFixed(3)} · ${data.prompt}`,
    `${hidden ? `${countOf(hidden, "node")} with ${formatShare(share)} of the influence are hidden` : `all ${countOf(data.nodes.count, "node")}`}${scene.leftOut ? `; ${countOf(scene.leftOut, "weak edge")} not drawn` : ""}`,
  ];
  caption.forEach((line, at) => pen.text(fitText(line, frame.outerWidth - 20, 11), 10, frame.outerHeight + 12 + 16 * at, {colour: at ? palette.soft : palette.ink, size: 11}));
  return {width: frame.outerWidth, height: frame.outerHeight + 38, text: svgFile(frame.outerWidth, frame.outerHeight + 38, palette.background, pen.markup())};
}

/** The whole subgraph at its natural size, with its scores. */
function subgraphPicture(data, store, services) {
  const {scene, subgraph, at} = services.panes.subgraph.view();
  const palette = services.palette();
  const middles = subgraph.boxes.map((box, number) => ({...at(number), half: boxHeight(box) / 2, side: box.width / 2}));
  const left = Math.min(...middles.map(({x, side}) => x - side)) - 12;
  const top = Math.min(...middles.map(({y, half}) => y - half)) - 12;
  const width = Math.max(480, Math.max(...middles.map(({x, side}) => x + side)) + 16 - left);
  const height = Math.max(...middles.map(({y, half}) => y + half)) + 12 - top;
  const copy = scene.cloneNode(true);
  copy.setAttribute("transform", `translate(${-left} ${-top})`);
  for (const element of copy.querySelectorAll("[class],[role],[tabindex],[data-key]")) {
    for (const {name} of [...element.attributes]) if (/^(class|role|tabindex|data-|aria-)/.test(name)) element.removeAttribute(name);
  }
  for (const line of copy.querySelectorAll("[stroke=transparent]")) line.remove();
  const pen = createSvgPen();
  const {replacement, completeness} = scoresOf(data, pinnedNodes(data, store.state.pinned));
  const lines = [`pinned: replacement ${replacement.toFixed(3)}, completeness ${completeness.toFixed(3)} · ${data.prompt}`, "width: signed sum of a link's weights ÷ inputs of its target; dashed: negative"];
  lines.forEach((line, number) => pen.text(fitText(line, width - 20, 11), 10, height + 10 + 16 * number, {colour: number ? palette.soft : palette.ink, size: 11}));
  const content = `${new XMLSerializer().serializeToString(copy)}\n${pen.markup()}`;
  return {width, height: height + 36, text: svgFile(width, height + 36, palette.background, content)};
}

async function savePicture(picture, format, name, services) {
  if (format === "svg") return services.download(`${name}.svg`, new Blob([picture.text], {type: "image/svg+xml"}));
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(picture.text)}`;
  await image.decode();
  const canvas = make("canvas", {width: Math.ceil(picture.width * PIXELS), height: Math.ceil(picture.height * PIXELS)});
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  canvas.toBlob((blob) => services.download(`${name}.png`, blob), "image/png");
}

function exportPicture(format, data, store, services) {
  return savePicture(graphPicture(data, store, services), format, "circuit", services);
}

function exportSubgraph(format, data, store, services) {
  if (!services.panes.subgraph.view().subgraph.boxes.length) return services.say("Nothing is pinned: the subgraph is empty");
  return savePicture(subgraphPicture(data, store, services), format, "subgraph", services);
}
