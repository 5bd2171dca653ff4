/**
 * What is drawn, apart from where to: every picture is drawn with a pen, on a canvas (`createCanvasPen`) or as SVG (picture.js).
 * A pen has `curve(points, style)`, `shape(kind, x, y, radius, style)`, `box(x, y, width, height, style)` and
 * `text(string, x, y, style)`. Styles: `stroke`, `fill`, `width`, `alpha`, `dashed`; of text `colour`, `size`, `align`, `angle`
 * (radians), `bold`, `halo` (colour of an outline that keeps it readable).
 */

const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif";

/** The colours of the theme, from the custom properties of style.css. */
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const names = ["background", "band", "line", "ink", "soft", "outline", "raise", "lower", "neutral", "feature", "token", "error", "logit", "accent"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** Between two colours `#rrggbb`; 0 gives the first. */
function mix(from, to, amount) {
  const channel = (colour, at) => parseInt(colour.slice(at, at + 2), 16);
  const mixed = [1, 3, 5].map((at) => Math.round(channel(from, at) + (channel(to, at) - channel(from, at)) * amount));
  return `#${mixed.map((value) => value.toString(16).padStart(2, "0")).join("")}`;
}

/** The colour of a signed share of a target's input. Small shares are told apart: intensity is the root of the share. */
function shareColour(palette, share) {
  return mix(palette.neutral, share < 0 ? palette.lower : palette.raise, Math.min(1, Math.sqrt(Math.abs(share)) * 1.15));
}

/** The corners of a node's outline, for kinds that have some. */
function cornersOf(kind, x, y, r) {
  if (kind === "diamond") return [[x, y - r], [x + r, y], [x, y + r], [x - r, y]];
  if (kind === "triangle") return [[x, y - r * 1.1], [x + r, y + r * 0.75], [x - r, y + r * 0.75]];
  if (kind === "square") return [[x - r, y - r], [x + r, y - r], [x + r, y + r], [x - r, y + r]];
  return null;
}

/** circle feature, triangle feature of attention, square token, position and logit, diamond error. */
function shapeOf(data, node) {
  const kind = data.nodes.kind[node];
  if (kind === KIND.error) return "diamond";
  if (kind !== KIND.feature) return "square";
  return data.nodes.part[node] === 1 ? "triangle" : "circle";
}

/** Bezier points from a source up to its target; inside a column it bows aside, so that it does not hide what lies between. */
function curvePoints(x1, y1, x2, y2) {
  const rise = (y1 - y2) * 0.5;
  const bow = Math.abs(x2 - x1) < 8 && rise > 30 ? Math.min(26, rise * 0.25) : 0;
  return [x1, y1, x1 + bow, y1 - rise, x2 + bow, y2 + rise, x2, y2];
}

function createCanvasPen(context) {
  const begin = (style) => {
    context.globalAlpha = style.alpha ?? 1;
    if (style.stroke) [context.strokeStyle, context.lineWidth] = [style.stroke, style.width ?? 1];
    if (style.fill) context.fillStyle = style.fill;
    context.setLineDash(style.dashed ? [3, 2.5] : []);
    context.beginPath();
  };
  const finish = (style) => {
    if (style.fill) context.fill();
    if (style.stroke) context.stroke();
  };
  return {
    curve([x1, y1, ...rest], style) {
      begin(style);
      context.moveTo(x1, y1);
      context.bezierCurveTo(...rest);
      finish(style);
    },
    shape(kind, x, y, radius, style) {
      begin(style);
      const corners = cornersOf(kind, x, y, radius);
      if (corners) {
        corners.forEach(([px, py], number) => (number ? context.lineTo(px, py) : context.moveTo(px, py)));
        context.closePath();
      } else context.arc(x, y, radius, 0, 2 * Math.PI);
      finish(style);
    },
    box(x, y, width, height, style) {
      begin(style);
      context.rect(x, y, width, height);
      finish(style);
    },
    text(string, x, y, {colour, size = 11, align = "left", angle = 0, bold = false, halo = null}) {
      context.save();
      context.globalAlpha = 1;
      context.font = `${bold ? "600 " : ""}${size}px ${FONT}`;
      [context.textAlign, context.textBaseline, context.fillStyle] = [align, "middle", colour];
      context.translate(x, y);
      context.rotate(angle);
      if (halo) {
        [context.strokeStyle, context.lineWidth, context.lineJoin] = [halo, 3, "round"];
        context.setLineDash([]);
        context.strokeText(string, 0, 0);
      }
      context.fillText(string, 0, 0);
      context.restore();
    },
  };
}

const measuring = {context: null, widths: new Map()};

/** Width of a text in pixels. */
function textWidth(string, size, bold = false) {
  const key = `${size}${bold}${string}`;
  if (!measuring.widths.has(key)) {
    measuring.context ??= document.createElement("canvas").getContext("2d");
    measuring.context.font = `${bold ? "600 " : ""}${size}px ${FONT}`;
    if (measuring.widths.size > 20000) measuring.widths.clear();
    measuring.widths.set(key, measuring.context.measureText(string).width);
  }
  return measuring.widths.get(key);
}

const segmenter = new Intl.Segmenter(undefined, {granularity: "grapheme"});

/** A text shortened to a width, with an ellipsis, never inside a character that is made of several. */
function fitText(string, width, size, bold = false) {
  if (textWidth(string, size, bold) <= width) return string;
  const characters = Array.from(segmenter.segment(string), ({segment}) => segment);
  let [low, high] = [0, characters.length];
  const shortened = (count) => `${characters.slice(0, count).join("").replace(/[\s.…]+$/, "")}…`;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (textWidth(shortened(middle), size, bold) <= width) low = middle;
    else high = middle - 1;
  }
  return shortened(low);
}

/** A text on one line or two of about the same length, broken between words; what does not fit ends in an ellipsis. */
function wrapText(string, width, size, bold = false) {
  if (textWidth(string, size, bold) <= width) return [string];
  const words = string.split(/ (?![|→…])/);
  const broken = words.map((_, first) => [words.slice(0, first).join(" "), words.slice(first).join(" ")]);
  const fitting = broken.slice(1).filter(([line]) => textWidth(line, size, bold) <= width);
  if (!fitting.length) return [fitText(string, width, size, bold)]; // a word that is longer than the line
  const even = fitting.find(([first, second]) => textWidth(second, size, bold) <= Math.max(textWidth(first, size, bold), width / 2));
  const [first, second] = even ?? fitting.at(-1);
  return [first, fitText(second, width, size, bold)];
}

/** A text whose writing direction does not touch what stands beside it. */
function isolate(text) {
  return `\u2068${text}\u2069`;
}
