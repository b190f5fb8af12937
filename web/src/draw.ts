/** Marks on a canvas. Knows numbers and pixels, no state. */
import { opacity, type Thinning, thickness } from "./colour.ts";
import type { Look } from "./lines.ts";

/** The part of a 2D context that is drawn with; a test hands in one that records. */
export type Pen = Pick<
  CanvasRenderingContext2D,
  "beginPath" | "moveTo" | "lineTo" | "bezierCurveTo" | "stroke" | "clearRect" | "fillRect" | "setTransform"
> & { globalAlpha: number; lineWidth: number; strokeStyle: unknown; fillStyle: unknown };

/** Where the rows of both token columns are, in CSS pixels. */
export interface Rows {
  width: number;
  height: number;
  first: number;
}

/** How lines look: their colours by slot, the slot that stands out while the others stay as a shade, and how far apart
 * slots lie, in CSS pixels. */
export interface Manner {
  colours: string[];
  spread: number;
  strong: number | null;
  thin: Thinning;
}

/** What is left of a line's opacity while another head stands out. */
export const SHADE = 0.05;

/** A canvas is not made larger than this, whatever the screen. */
const MOST_PIXELS = 16e6;

/** Sizes the canvas for the screen and clears it, so that one unit is one CSS pixel. */
export function prepare(canvas: HTMLCanvasElement, width: number, height: number): Pen | null {
  const scale = Math.min(devicePixelRatio, Math.sqrt(MOST_PIXELS / Math.max(1, width * height)));
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
  }
  const pen = canvas.getContext("2d");
  pen?.setTransform(scale, 0, 0, scale, 0, 0);
  pen?.clearRect(0, 0, width, height);
  return pen;
}

/**
 * Draws lines from queries (left) to keys (right), the higher the weight the thicker and darker.
 *
 * `looks` come lightest first, so that the heavy ones lie on top.
 */
export function drawLines(pen: Pen, looks: Look[], rows: Rows, manner: Manner): void {
  const { colours, spread, strong, thin } = manner;
  const middle = (token: number, slot: number) =>
    (token - rows.first + 0.5) * rows.height + (slot - (colours.length - 1) / 2) * spread;
  const bend = rows.width * 0.4;
  for (const { slot, query, key, weight } of looks) {
    const [from, to] = [middle(query, slot), middle(key, slot)];
    pen.globalAlpha = opacity(weight, thin) * (strong === null || strong === slot ? 1 : SHADE);
    pen.lineWidth = thickness(weight, thin);
    pen.strokeStyle = colours[slot];
    pen.beginPath();
    pen.moveTo(0, from);
    pen.bezierCurveTo(bend, from, rows.width - bend, to, rows.width, to);
    pen.stroke();
  }
  pen.globalAlpha = 1;
}

/** The frame of a curve: pixels, and the numbers at its edges. */
export interface Frame {
  width: number;
  height: number;
  x: [number, number];
  y: [number, number];
}

/** The pixel of a number along one axis; the middle where the axis has no length. */
export function place(value: number, [from, to]: [number, number], pixels: number): number {
  return to === from ? pixels / 2 : ((value - from) / (to - from)) * pixels;
}

/** Draws a series as one line, broken where a value is missing. */
export function drawCurve(pen: Pen, steps: number[], values: (number | null)[], frame: Frame, colour: string): void {
  pen.strokeStyle = colour;
  pen.lineWidth = 1.25;
  pen.beginPath();
  let down = false;
  for (let i = 0; i < steps.length; i++) {
    const value = values[i];
    if (value === null) {
      down = false;
      continue;
    }
    const x = place(steps[i], frame.x, frame.width);
    const y = frame.height - place(value, frame.y, frame.height);
    if (down) pen.lineTo(x, y);
    else pen.moveTo(x, y);
    down = true;
  }
  pen.stroke();
}

/** Draws a tick for each step, at most one every third pixel. */
export function drawTicks(pen: Pen, steps: number[], frame: Frame, top: number, high: number, colour: string): void {
  pen.fillStyle = colour;
  let last = Number.NEGATIVE_INFINITY;
  for (const step of steps) {
    const x = Math.round(place(step, frame.x, frame.width));
    if (x - last < 3) continue;
    pen.fillRect(x - 0.5, top, 1, high);
    last = x;
  }
}

/** The smallest and largest of some numbers, null where there are none. */
export function extent(values: Iterable<number | null>): [number, number] | null {
  let low = Number.POSITIVE_INFINITY;
  let high = Number.NEGATIVE_INFINITY;
  for (const value of values) {
    if (value === null) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return low <= high ? [low, high] : null;
}
