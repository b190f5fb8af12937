import { expect, test } from "vitest";
import { Madeup } from "../dev/madeup.ts";
import { type Lines, looksOf, neighbour, questionOf, readLines, strokesOf, withheld } from "./lines.ts";
import type { LinesFacts, LinesQuestion, Reply } from "./protocol.ts";

const question: LinesQuestion = {
  ask: "lines",
  step: 5,
  layer: 1,
  example: 0,
  heads: [4, 9],
  first: 3,
  count: 2,
  top: 2,
};
const facts: LinesFacts = {
  top: 2,
  shown_first: 3,
  shown_count: 2,
  mask: "none",
  withheld: "",
  check: { error: 1e-7, limit: 0.02, note: "", passed: true },
  route: "sdpa",
  dtype: "float32",
  scale: 0.125,
};

/** Two heads, two queries (3 and 4), the two heaviest keys of each. */
function lines(change: Partial<Lines> = {}): Lines {
  const weight = Float32Array.of(0.75, 0.125, 0.5, 0.25, 0.5, 0.001, 0, 0);
  const key = Int32Array.of(4, 3, 3, 4, 3, 4, -1, -1);
  return { ...facts, question, weight, key, share: Float32Array.of(0.875, 0.75, 0.501, 0), ...change };
}

function reply({ weight, key, share }: Lines, said: LinesFacts = facts): Reply {
  const tensors = new Map([
    ["weight", { shape: [2, 2, 2], data: weight }],
    ["key", { shape: [2, 2, 2], data: key }],
    ["share", { shape: [2, 2], data: share }],
  ]);
  return { facts: said, tensors, bytes: 0 };
}

test("a reply becomes a picture", () => {
  expect(readLines(question, reply(lines()))).toEqual(lines());
});

test("arrays that do not fit their facts are refused", () => {
  expect(() => readLines(question, reply(lines(), { ...facts, top: 3 }))).toThrow("do not fit");
  expect(() => readLines(question, { facts, tensors: new Map(), bytes: 0 })).toThrow("no tensor weight");
});

test("a layer that failed its self-check has no weights to give, whatever came", () => {
  const failed = lines({ check: { error: 0.4, limit: 0.02, note: "", passed: false } });
  expect(withheld(failed)).toBe(true);
  expect(withheld(lines())).toBe(false);
  expect(strokesOf(failed, null)).toEqual({ looks: [], share: 0 });
  expect(looksOf(failed, { side: "query", token: 3 })).toEqual([]);
});

test("weights that are not the tokens' own are withheld, and no arrays need come", () => {
  const said = { ...facts, withheld: "Keys are patches." };
  const none = readLines(question, { facts: said, tensors: new Map(), bytes: 0 });
  expect([withheld(none), none.weight.length]).toEqual([true, 0]);
  expect(strokesOf(none, null)).toEqual({ looks: [], share: 0 });
});

test("a server that says neither mask nor why it withholds is an older one", () => {
  const { mask, withheld: why, ...older } = facts;
  expect(withheld(readLines(question, reply(lines(), older)))).toBe(false);
});

test("a query's weights come heaviest first, with every head's", () => {
  expect(looksOf(lines(), { side: "query", token: 3 })).toEqual([
    { slot: 0, query: 3, key: 4, weight: 0.75 },
    { slot: 1, query: 3, key: 3, weight: 0.5 },
    { slot: 0, query: 3, key: 3, weight: 0.125 },
    { slot: 1, query: 3, key: 4, weight: Math.fround(0.001) },
  ]);
});

test("a key's weights are those of the queries that look at it", () => {
  const found = looksOf(lines(), { side: "key", token: 4 });
  expect(found.map(({ slot, query, weight }) => [slot, query, weight])).toEqual([
    [0, 3, 0.75],
    [0, 4, 0.25],
    [1, 3, Math.fround(0.001)],
  ]);
});

test("a token outside the window has none", () => {
  for (const token of [2, 5]) expect(looksOf(lines(), { side: "query", token })).toEqual([]);
});

test("what is drawn is thinned, lightest first, and says how much of the mass it holds", () => {
  const { looks, share } = strokesOf(lines(), null);
  expect(looks.map(({ weight }) => weight)).toEqual([0.125, 0.25, 0.5, 0.5, 0.75]);
  // The last row looks at nothing and has no mass to show a part of.
  expect(share).toBeCloseTo((0.875 + 0.75 + 0.5) / 3, 6);
});

test("the share counts what the server left out", () => {
  const half = lines({ share: Float32Array.of(0.4375, 0.375, 0.2505, 0) });
  expect(strokesOf(half, null).share).toBeCloseTo(strokesOf(lines(), null).share / 2, 6);
});

test("with a focus only its lines are drawn", () => {
  const query = strokesOf(lines(), { side: "query", token: 3 });
  expect(query.looks.every((look) => look.query === 3)).toBe(true);
  expect(query.share).toBeCloseTo((0.875 + 0.5) / 2, 6);
  expect(strokesOf(lines(), { side: "key", token: 4 }).looks.map(({ weight }) => weight)).toEqual([0.25, 0.75]);
});

test("of too many lines the heaviest stay", () => {
  expect(strokesOf(lines(), null, 0, 2).looks.map(({ weight }) => weight)).toEqual([0.5, 0.75]);
});

test("with nothing left out the made-up run shows all of its mass", async () => {
  const asked = { ...question, step: 0, heads: [0, 1], first: 0, count: 64, top: 64 };
  const whole = readLines(asked, await new Madeup().ask(asked));
  expect(strokesOf(whole, null, 0).share).toBeCloseTo(1, 5);
});

test.each([
  [null, "ArrowDown", { side: "query", token: 3 }],
  [null, "ArrowUp", { side: "query", token: 4 }],
  [null, "ArrowRight", { side: "key", token: 3 }],
  [{ side: "query", token: 3 }, "ArrowDown", { side: "query", token: 4 }],
  [{ side: "query", token: 4 }, "ArrowDown", { side: "query", token: 4 }],
  [{ side: "key", token: 3 }, "ArrowUp", { side: "key", token: 3 }],
  [{ side: "query", token: 3 }, "ArrowRight", { side: "key", token: 4 }],
  [{ side: "key", token: 4 }, "ArrowLeft", { side: "query", token: 3 }],
  [{ side: "query", token: 3 }, "ArrowLeft", null],
  [{ side: "key", token: 3 }, "ArrowRight", null],
] as const)("from %j %s leads to %j", (focus, key, to) => {
  expect(neighbour(lines(), focus, key)).toEqual(to);
});

test("a question is cut to the layer and the example", () => {
  const layer = { path: "a", call: 0, heads: 4, kv_heads: 4, kept: null, route: "sdpa" };
  const example = { text: "", tokens: Array(30).fill("x"), special: [], label: null };
  const wanted = { step: 1, layer: 0, example: 0, heads: [1, 7], first: 20, count: 20 };
  expect(questionOf(layer, example, wanted)).toMatchObject({ ask: "lines", heads: [1], first: 20, count: 10, top: 10 });
  expect(questionOf(layer, example, { ...wanted, heads: [7] }).heads).toEqual([0]);
  expect(questionOf({ ...layer, kept: [2, 3] }, example, { ...wanted, heads: [1, 3] }).heads).toEqual([3]);
  expect(questionOf({ ...layer, kept: [2, 3] }, example, wanted).heads).toEqual([2]);
  expect(questionOf(layer, example, { ...wanted, first: 30 })).toMatchObject({ first: 0, count: 20 });
  const long = { ...example, tokens: Array(200).fill("x") };
  expect(questionOf(layer, long, { ...wanted, count: 100 })).toMatchObject({ count: 100, top: 64 });
});
