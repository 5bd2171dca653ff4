/** Pointer and keys of the subgraph: click and Shift-click, a frame around boxes, dragging, wheel; all of it with the keyboard too. */

const MOVE_STEP = 12; // pixels by which Shift and an arrow key move boxes

function listenToSubgraph(svg, {store, pane, tools, draw, drawFocus, at, focusBox, marquee, boxes}) {
  let drag = null;
  const keyOf = (event) => event.target.closest?.(".box")?.dataset.key ?? null;
  const inScene = (event) => {
    const frame = svg.getBoundingClientRect();
    return [(event.clientX - frame.left - pane.left) / pane.zoom, (event.clientY - frame.top - pane.top) / pane.zoom];
  };
  const toggle = (key) => {
    const chosen = new Set(pane.chosen);
    if (!chosen.delete(key)) chosen.add(key);
    tools.choose(chosen);
  };
  const move = (keys, x, y) => {
    const moved = new Map(store.state.places);
    boxes().forEach(({key}, number) => {
      if (!keys.has(key)) return;
      const place = at(number);
      moved.set(key, [place.x + x, place.y + y]);
    });
    store.update({places: moved});
  };

  /** A click or Enter: a node is selected, a group shows its members. */
  function activate(key, event) {
    const box = boxes().find((other) => other.key === key);
    pane.last = key;
    if (event.shiftKey) return toggle(key);
    const member = event.target.closest?.("[data-node]");
    tools.choose([key]);
    if (member) store.update({selected: Number(member.dataset.node)});
    else if (!box.group) store.update({selected: box.nodes[0]});
    else if (event.type === "keydown") tools.open();
  }

  svg.addEventListener("pointerdown", (event) => {
    if (event.button > 1) return;
    const [key, [x, y]] = [keyOf(event), inScene(event)];
    const isPan = event.button === 1 || event.altKey;
    drag = {key: isPan ? null : key, x, y, left: pane.left, top: pane.top, clientX: event.clientX, clientY: event.clientY, moved: false, isPan, target: event.target};
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (!drag) return hover(event);
    const [dx, dy] = [event.clientX - drag.clientX, event.clientY - drag.clientY];
    if (!drag.moved && Math.hypot(dx, dy) < 4) return;
    drag.moved = true;
    if (drag.isPan) Object.assign(pane, {left: drag.left + dx, top: drag.top + dy, isFit: false});
    else if (drag.key) pane.moving = {keys: pane.chosen.has(drag.key) ? pane.chosen : new Set([drag.key]), x: dx / pane.zoom, y: dy / pane.zoom};
    else return drawMarquee(event);
    draw();
  });
  svg.addEventListener("pointerup", (event) => {
    const done = drag;
    drag = null;
    marquee.setAttribute("visibility", "hidden");
    if (!done) return;
    if (!done.moved && done.key) return activate(done.key, {type: "click", shiftKey: event.shiftKey, target: done.target});
    if (!done.moved && !done.isPan) return tools.choose([]);
    if (done.isPan) return;
    if (pane.moving) {
      const {keys, x, y} = pane.moving;
      pane.moving = null;
      return move(keys, x, y);
    }
    const [x, y] = inScene(event);
    const inside = boxes().filter((_, number) => between(at(number).x, done.x, x) && between(at(number).y, done.y, y));
    tools.choose([...(event.shiftKey ? pane.chosen : []), ...inside.map(({key}) => key)]);
  });
  svg.addEventListener("dblclick", (event) => { if (keyOf(event)) tools.rename(); });
  svg.addEventListener("pointerleave", () => { if (!drag) setFocus(null, null); });
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    const frame = svg.getBoundingClientRect();
    zoomBy(Math.exp(-event.deltaY * 0.0015), event.clientX - frame.left, event.clientY - frame.top);
  }, {passive: false});

  /** Zooms about a point of the pane, by default its middle. */
  function zoomBy(factor, x = pane.width / 2, y = pane.height / 2) {
    const zoom = clamp(pane.zoom * factor, 0.15, 4);
    const scale = zoom / pane.zoom;
    Object.assign(pane, {zoom, left: x - (x - pane.left) * scale, top: y - (y - pane.top) * scale, isFit: false});
    draw();
  }

  function hover(event) {
    const key = keyOf(event);
    const member = event.target.closest?.("[data-node]");
    const box = boxes().find((other) => other.key === key);
    setFocus(key, member ? Number(member.dataset.node) : box && !box.group ? box.nodes[0] : null);
  }

  function setFocus(key, hovered) {
    if (pane.focus === key && store.state.hovered === hovered) return;
    pane.focus = key;
    if (store.state.hovered === hovered) drawFocus();
    else store.update({hovered});
  }

  function drawMarquee(event) {
    const frame = svg.getBoundingClientRect();
    const [x1, y1, x2, y2] = [drag.clientX - frame.left, drag.clientY - frame.top, event.clientX - frame.left, event.clientY - frame.top];
    const fields = {x: Math.min(x1, x2), y: Math.min(y1, y2), width: Math.abs(x2 - x1), height: Math.abs(y2 - y1), visibility: "visible"};
    for (const [name, value] of Object.entries(fields)) marquee.setAttribute(name, value);
  }

  svg.addEventListener("focusin", (event) => {
    const key = keyOf(event);
    if (key && key !== pane.last) focusBox(key);
  });
  svg.addEventListener("keydown", (event) => {
    const key = keyOf(event);
    if (!key || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    const chosen = pane.chosen.has(key) ? pane.chosen : new Set([key]);
    const choice = (action) => () => { tools.choose(chosen); action(); };
    const actions = {
      Enter: () => activate(key, event), " ": () => toggle(key), F2: () => { tools.choose([key]); tools.rename(); },
      g: choice(tools.group), G: choice(tools.ungroup), Delete: choice(tools.unpin), Backspace: choice(tools.unpin), p: choice(tools.unpin),
      "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(0.8), f: tools.fit, 0: tools.fit,
    };
    if (step && event.shiftKey) move(chosen, step[0] * MOVE_STEP, step[1] * MOVE_STEP);
    else if (step) walkTo(key, step);
    else if (Object.hasOwn(actions, event.key)) actions[event.key]();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  function walkTo(key, [right, down]) {
    const all = boxes();
    const coordinates = {x: all.map((_, number) => at(number).x), y: all.map((_, number) => at(number).y)};
    const to = neighbour(coordinates, all.findIndex((box) => box.key === key), right, down);
    if (to === null) return;
    focusBox(all[to].key);
    pane.focus = all[to].key;
    store.update({hovered: all[to].group ? null : all[to].nodes[0]});
    drawFocus();
  }
}

function between(value, one, other) {
  return value >= Math.min(one, other) && value <= Math.max(one, other);
}
