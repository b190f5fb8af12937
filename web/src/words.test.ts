import { expect, test } from "vitest";
import type { Example, Life, StepFacts } from "./protocol.ts";
import {
  checkText,
  duration,
  errorText,
  headsText,
  lifeNote,
  lifeText,
  maskText,
  moreText,
  nothingText,
  percent,
  scalarText,
  splitToken,
  stepCheckText,
  verdict,
  weightText,
  withheldText,
} from "./words.ts";

const life: Life = { state: "training", step: 420, age_s: 2, alive: true, message: "", skipped: 0, thinned: 0 };

test.each<[Partial<Life>, number, string]>([
  [{}, 2, "training · step 420 · 2 s ago"],
  [{ skipped: 1200 }, 2, "training · step 420 · 2 s ago · 1,200 captures skipped"],
  [{ step: null }, 2, "Waiting for the first step of runs/a."],
  [{ step: null, message: "NO ATTENTION" }, 2, "training · no step yet · 2 s ago"],
  [{ state: "waiting", step: null }, 90, "Waiting for the first step of runs/a."],
  [{ alive: false }, 190, "No sign of the trainer for 3 minutes; last step 420."],
  [{ alive: false, step: null }, 61, "No sign of the trainer for 1 minute; no step yet."],
  [{ state: "ended", step: 3000 }, 9, "Training ended at step 3,000."],
  [{ state: "stopped" }, 9, "Training was stopped at step 420."],
  [
    { state: "stopped", message: "KeyboardInterrupt at step 416" },
    9,
    "Training was stopped: KeyboardInterrupt at step 416",
  ],
  [{ state: "failed" }, 9, "Training failed at step 420."],
  [{ state: "failed", message: "ValueError at step 416" }, 9, "Training failed: ValueError at step 416"],
])("%j is said as a sentence", (change, age_s, sentence) => {
  expect(lifeText({ ...life, ...change }, "runs/a", age_s)).toBe(sentence);
});

test("durations", () => {
  expect([0, 59.9, 60, 3599, 3600, 7200, 90000].map(duration)).toEqual([
    "0 s",
    "59 s",
    "1 minute",
    "59 minutes",
    "1 hour",
    "2 hours",
    "1 day",
  ]);
});

test("weights have four places, and a little is not nothing", () => {
  expect([0.4132059, 1, 0.00005, 0.00004, 0].map(weightText)).toEqual(["0.4132", "1.0000", "0.0001", "<0.0001", "0"]);
});

test("a percent is not rounded up to all", () => {
  expect([0.9432, 0.9951, 0.9996, 1, 0].map(percent)).toEqual(["94 %", "> 99 %", "100 %", "100 %", "0 %"]);
});

test("errors and logged numbers", () => {
  expect([3e-7, 0.4, 0.02, 0].map(errorText)).toEqual(["3e-7", "0.4", "0.02", "0"]);
  expect([0.31119, 2e-5, 12345.6, 0, -0.5, 1e7].map(scalarText)).toEqual([
    "0.3112",
    "2.00e-5",
    "12,346",
    "0",
    "-0.5",
    "1.00e+7",
  ]);
});

const facts: StepFacts = {
  step: 1,
  predictions: [1, null],
  probabilities: [[0.1, 0.9], null],
  loss: 0.3,
  worst_check: 3e-7,
  failed: [],
  forwards: {},
};

test("the self-check of a step", () => {
  expect(stepCheckText(facts)).toBe("self-check 3e-7");
  expect(stepCheckText({ ...facts, worst_check: null })).toBe("no self-check");
  expect(stepCheckText({ ...facts, worst_check: 0.4, failed: [3] })).toBe("self-check failed in layer 3");
  expect(stepCheckText({ ...facts, worst_check: 0.4, failed: [3, 5] })).toBe("self-check failed in layers 3, 5");
});

test("the self-check of a layer", () => {
  const check = { error: 0.4, limit: 0.02, note: "", passed: false };
  expect(checkText(check)).toBe("0.4 (limit 0.02)");
  expect(checkText({ ...check, limit: null })).toBe("0.4");
  expect(checkText({ ...check, error: null, note: "unchecked: dropout" })).toBe("unchecked: dropout");
});

test("why a layer is not drawn", () => {
  const check = { error: 0.4, limit: 0.02, note: "", passed: false };
  const lines = { top: 0, shown_first: 0, shown_count: 5, check, route: "sdpa", dtype: "float32", scale: 1 };
  expect(withheldText(3, lines)).toBe("Layer 3 failed its self-check (0.4): not drawn.");
  expect(withheldText(3, { ...lines, check: { ...check, error: null } })).toBe(
    "Layer 3 failed its self-check: not drawn.",
  );
  expect(withheldText(3, { ...lines, withheld: "Keys are patches." })).toBe("Keys are patches.");
});

test("a mask is none, causal or given, which it is where an older server does not say", () => {
  expect([maskText("none"), maskText("causal"), maskText("given"), maskText()]).toEqual([
    "none",
    "causal",
    "given as a tensor",
    "given as a tensor",
  ]);
});

test("a run without a picture says why, in the trainer's words if it has any", () => {
  const caught = "NO ATTENTION WAS CAUGHT in Net: it calls none";
  expect(nothingText("runs/a", { ...life, message: caught }, 0)).toBe(caught);
  expect(nothingText("runs/a", life, 3)).toBe("This run has no attention on fixed examples to show.");
  expect(nothingText("runs/a", { ...life, state: "waiting" }, 0)).toBe("Waiting for the first step of runs/a.");
  expect(nothingText("runs/a", { ...life, state: "ended" }, 0)).toBe("Training is over, and no step was captured.");
});

test("what the trainer noted is told once", () => {
  expect(lifeNote({ ...life, message: "captures are off" })).toBe("captures are off");
  expect(lifeNote({ ...life, state: "ended", message: "captures are off" })).toBe("captures are off");
  expect(lifeNote({ ...life, state: "failed", message: "ValueError" })).toBe("");
});

test("the tokens that are not drawn are counted", () => {
  expect(moreText(0, 0)).toBe("");
  expect(moreText(0, 1)).toBe("1 more token after these");
  expect(moreText(20, 0)).toBe("20 more tokens before these");
  expect(moreText(1, 1200)).toBe("1 more token before these, 1,200 after");
});

test("a prediction is judged by its label, if both are there", () => {
  const example: Example = { text: "", tokens: [], special: [], label: 0 };
  const names = ["negative", "positive"];
  expect(verdict(facts, 0, example, names)).toEqual({
    predicted: "positive",
    probability: 0.9,
    label: "negative",
    right: false,
  });
  expect(verdict(facts, 0, { ...example, label: 1 }, null)).toMatchObject({ predicted: "class 1", right: true });
  expect(verdict(facts, 0, { ...example, label: null }, names)).toMatchObject({ label: null, right: null });
  expect(verdict(facts, 1, example, names)).toBeNull();
});

test.each([
  ["movie", "", "movie"],
  ["##ing", "##", "ing"],
  ["##", "", "##"],
  ["Ġmovie", "Ġ", "movie"],
  ["▁▁film", "▁▁", "film"],
  ["Ċ", "Ċ", ""],
  [" a", "␣", "a"],
  ["", "", ""],
])("%j is mark %j and text %j", (token, mark, text) => {
  expect(splitToken(token)).toEqual({ mark, text });
});

test("heads in words", () => {
  expect(headsText([3])).toBe("head 3");
  expect(headsText([3, 5])).toBe("heads 3, 5");
  expect(headsText([0, 1, 2, 3, 4, 5, 6])).toBe("7 heads");
});
