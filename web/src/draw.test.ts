import { expect, test } from "vitest";
import { opacity, thickness, thinning } from "./colour.ts";
import { drawCurve, drawLines, drawTicks, extent, type Pen, place, SHADE } from "./draw.ts";

/** A pen that writes down what it is told. */
function recorder() {
  const said: unknown[][] = [];
  const strokes: { alpha: number; width: number; colour: unknown }[] = [];
  const note =
    (name: string) =>
    (...rest: unknown[]) =>
      void said.push([name, ...rest]);
  const pen: Pen = {
    globalAlpha: 1,
    lineWidth: 1,
    strokeStyle: "",
    fillStyle: "",
    beginPath: note("begin"),
    moveTo: note("move"),
    lineTo: note("line"),
    bezierCurveTo: note("curve"),
    clearRect: note("clear"),
    fillRect: note("rect"),
    setTransform: note("transform"),
    stroke: () => void strokes.push({ alpha: pen.globalAlpha, width: pen.lineWidth, colour: pen.strokeStyle }),
  };
  return {
    pen,
    said,
    strokes,
    of: (name: string) => said.filter(([first]) => first === name).map((each) => each.slice(1)),
  };
}

const rows = { width: 200, height: 20, first: 10 };
const thin = thinning(1, 20);
const plain = { colours: ["ink"], spread: 0, strong: null, thin };

test("a line leads from the middle of its query's row to the middle of its key's", () => {
  const { pen, of } = recorder();
  drawLines(pen, [{ slot: 0, query: 11, key: 14, weight: 0.5 }], rows, plain);
  expect(of("move")).toEqual([[0, 30]]);
  expect(of("curve")).toEqual([[80, 30, 120, 90, 200, 90]]);
});

test("the higher the weight the thicker and darker, in the order given", () => {
  const { pen, strokes } = recorder();
  const looks = [0.01, 0.1, 0.9].map((weight) => ({ slot: 0, query: 10, key: 10, weight }));
  drawLines(pen, looks, rows, plain);
  expect(strokes.map(({ alpha }) => alpha)).toEqual([0.01, 0.1, 0.9].map((weight) => opacity(weight, thin)));
  expect(strokes.map(({ width }) => width)).toEqual([0.01, 0.1, 0.9].map((weight) => thickness(weight, thin)));
  expect(pen.globalAlpha).toBe(1);
});

test("heads have their own colours and lie side by side", () => {
  const { pen, of, strokes } = recorder();
  const looks = [0, 1, 2].map((slot) => ({ slot, query: 10, key: 10, weight: 1 }));
  drawLines(pen, looks, rows, { ...plain, colours: ["a", "b", "c"], spread: 4 });
  expect(of("move").map(([, y]) => y)).toEqual([6, 10, 14]);
  expect(strokes.map(({ colour }) => colour)).toEqual(["a", "b", "c"]);
});

test("a head that stands out leaves the others a shade", () => {
  const { pen, strokes } = recorder();
  const looks = [0, 1].map((slot) => ({ slot, query: 10, key: 10, weight: 1 }));
  drawLines(pen, looks, rows, { ...plain, colours: ["a", "b"], strong: 1 });
  expect(strokes.map(({ alpha }) => alpha)).toEqual([SHADE, 1]);
});

test("a number has its place along an axis", () => {
  expect(place(5, [0, 10], 200)).toBe(100);
  expect(place(0, [-10, 10], 200)).toBe(100);
  expect(place(7, [7, 7], 200)).toBe(100);
});

const frame = { width: 100, height: 50, x: [0, 10] as [number, number], y: [0, 1] as [number, number] };

test("a curve rises to the top and is broken where a value is missing", () => {
  const { pen, of, strokes } = recorder();
  drawCurve(pen, [0, 2, 4, 6, 8], [0, 1, null, 0.5, 0.5], frame, "ink");
  expect(of("move")).toEqual([
    [0, 50],
    [60, 25],
  ]);
  expect(of("line")).toEqual([
    [20, 0],
    [80, 25],
  ]);
  expect(strokes).toHaveLength(1);
});

test("ticks that would touch are left out", () => {
  const { pen, of } = recorder();
  drawTicks(pen, [0, 0.1, 5, 10], frame, 40, 5, "ink");
  expect(of("rect")).toEqual([
    [-0.5, 40, 1, 5],
    [49.5, 40, 1, 5],
    [99.5, 40, 1, 5],
  ]);
});

test("the extent of numbers leaves out what is missing", () => {
  expect(extent([3, null, -1, 2])).toEqual([-1, 3]);
  expect(extent([null])).toBeNull();
});
