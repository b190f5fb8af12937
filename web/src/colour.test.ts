import { expect, test } from "vitest";
import { assign, bars, HEAD_COLOURS, headColour, opacity, thickness, thinning } from "./colour.ts";

const none = new Map<number, number>();

test("one head has no colour of its own, nor have more than eight", () => {
  expect(assign(none, [3]).size).toBe(0);
  expect(assign(none, [0, 1, 2, 3, 4, 5, 6, 7]).size).toBe(8);
  expect(assign(none, [0, 1, 2, 3, 4, 5, 6, 7, 8]).size).toBe(0);
});

test("no two heads share a colour", () => {
  expect(new Set(assign(none, [9, 2, 5, 7, 1, 0, 11, 4]).values()).size).toBe(8);
});

test("a head keeps its colour while others come and go", () => {
  const three = assign(none, [2, 5, 9]);
  const two = assign(three, [5, 9]);
  expect([two.get(5), two.get(9)]).toEqual([three.get(5), three.get(9)]);
  const again = assign(two, [1, 5, 9]);
  expect(again.get(1)).toBe(three.get(2));
  expect(again.get(5)).toBe(three.get(5));
});

test("ink is the page's own", () => {
  expect(headColour(none, 4, "#123")).toBe("#123");
  expect(headColour(new Map([[4, HEAD_COLOURS.indexOf("ink")]]), 4, "#123")).toBe("#123");
  expect(headColour(new Map([[4, 0]]), 4, "#123")).toBe("#0072b2");
});

test("more weight is more ink, up to all of it", () => {
  const thin = thinning(1, 20);
  const weights = [0, 0.005, 0.05, 0.3, 0.9, 1];
  for (const ink of [opacity, thickness])
    for (let i = 1; i < weights.length; i++) expect(ink(weights[i], thin)).toBeGreaterThan(ink(weights[i - 1], thin));
  expect(opacity(1, thin)).toBe(1);
  expect(opacity(1.0001, thin)).toBe(1);
});

test("many heads or tokens are drawn lighter and thinner", () => {
  expect(thinning(1, 20)).toEqual({ opacity: 1, thickness: 1 });
  expect(thinning(16, 20).opacity).toBe(0.25);
  expect(thinning(1, 48).thickness).toBe(0.5);
  expect(thinning(1, 512).thickness).toBe(0.4);
});

test("bars are as long as the weights, one below the other, from the side of the lines", () => {
  const two = bars(
    [
      { weight: 0.25, colour: "red" },
      { weight: 2, colour: "blue" },
    ],
    "right",
  );
  expect(two).toContain("red 28%");
  expect(two).toContain("right 0% / 25% 50% no-repeat");
  expect(two).toContain("right 100% / 100% 50% no-repeat");
  expect(bars([{ weight: 0.5, colour: "red" }], "left")).toContain("left 0% / 50% 100% no-repeat");
  expect(bars([], "left")).toBe("");
});
