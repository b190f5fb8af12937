import { afterEach, expect, test, vi } from "vitest";
import { Madeup, type Making } from "../dev/madeup.ts";
import { Gone, type LinesQuestion, Problem } from "./protocol.ts";
import { append, State, union } from "./state.ts";

const lives: AbortController[] = [];

afterEach(() => {
  for (const life of lives.splice(0)) life.abort();
  vi.useRealTimers();
});

const settle = async () => {
  for (let i = 0; i < 20; i++) await Promise.resolve();
};

async function open(making: Partial<Making> = {}) {
  const madeup = new Madeup({ state: "training", layers: 4, ...making });
  const life = new AbortController();
  lives.push(life);
  const state = new State(madeup, life.signal);
  await settle();
  const lines = () => madeup.asked.filter((question): question is LinesQuestion => question.ask === "lines");
  return { madeup, state, lines };
}

test("it opens at the newest step, where most changed", async () => {
  const { state, lines } = await open({ steps: 5 });
  expect(lines()).toHaveLength(1);
  expect(state.lines.value?.question).toMatchObject({
    step: 40,
    layer: 3,
    heads: [7],
    example: 1,
    first: 0,
    count: 20,
  });
  expect(state.facts.value?.step).toBe(40);
});

test("with one step it shows what there is, and looks when there are two", async () => {
  const { madeup, state } = await open({ steps: 1 });
  expect(state.lines.value?.question).toMatchObject({ step: 0, layer: 0, heads: [0], example: 0 });
  madeup.train();
  await settle();
  expect(state.lines.value?.question).toMatchObject({ step: 10, layer: 3, heads: [7], example: 1 });
  expect(madeup.asked.filter(({ ask }) => ask === "first_look")).toHaveLength(1);
});

test("who has picked is not moved", async () => {
  const { madeup, state } = await open({ steps: 1 });
  state.pick({ layer: 2 });
  madeup.train();
  await settle();
  expect(state.lines.value?.question).toMatchObject({ step: 10, layer: 2, heads: [0], example: 0 });
  expect(madeup.asked.filter(({ ask }) => ask === "first_look")).toHaveLength(0);
});

test("before the first step it waits, and the run's layers are asked for when it comes", async () => {
  const { madeup, state, lines } = await open({ steps: 0, state: "waiting" });
  expect([state.step.value, lines().length]).toEqual([null, 0]);
  madeup.train();
  await settle();
  expect(state.run.value?.layers).toHaveLength(4);
  expect(state.lines.value?.question.step).toBe(0);
});

test("it follows new steps until someone scrubs, and again when asked to", async () => {
  const { madeup, state } = await open({ steps: 3 });
  madeup.train();
  expect(state.step.value).toBe(30);
  state.go(1);
  madeup.train();
  expect([state.step.value, state.following.value, state.steps.value.length]).toEqual([10, false, 5]);
  state.follow(true);
  expect([state.step.value, state.following.value]).toEqual([40, true]);
});

test("the slider stops at its ends", async () => {
  const { state } = await open({ steps: 3 });
  state.go(7);
  expect(state.step.value).toBe(20);
  state.go(-1);
  expect(state.step.value).toBe(0);
});

test("the old picture stays until the new one is there", async () => {
  const { state } = await open({ steps: 3 });
  state.go(0);
  expect(state.lines.value?.question.step).toBe(20);
  await settle();
  expect(state.lines.value?.question.step).toBe(0);
});

test("going back asks nobody", async () => {
  const { state, madeup } = await open({ steps: 3 });
  state.go(0);
  await settle();
  const asked = madeup.asked.length;
  state.go(2);
  expect(state.lines.value?.question.step).toBe(20);
  expect(madeup.asked).toHaveLength(asked);
});

test("heads are picked one, some or all, and never none", async () => {
  const { state } = await open({ heads: 4 });
  state.pickHead(2, false);
  state.pickHead(0, true);
  expect(state.picks.value.heads).toEqual([0, 2]);
  state.pickHead(2, true);
  state.pickHead(0, true);
  expect(state.picks.value.heads).toEqual([0]);
  state.toggleAll();
  expect(state.picks.value.heads).toEqual([0, 1, 2, 3]);
  state.toggleAll();
  expect(state.picks.value.heads).toEqual([0]);
});

test("colours change with the picture, not before", async () => {
  const { state } = await open({ heads: 4 });
  state.pickHead(2, true);
  expect(state.slots.value.size).toBe(0);
  await settle();
  expect([...state.slots.value.keys()]).toEqual(state.lines.value?.question.heads);
});

test("heads and layers turn around the end", async () => {
  const { state } = await open({ heads: 4 });
  state.pick({ layer: 0, heads: [0] });
  state.turn("head", -1);
  state.turn("layer", -1);
  expect(state.picks.value).toMatchObject({ layer: 3, heads: [3] });
});

test("a token is held until it is let go", async () => {
  const { state } = await open();
  const token = { side: "query" as const, token: 4 };
  state.hold(token);
  state.hover.value = { side: "key", token: 2 };
  expect(state.looked.value).toEqual({ side: "key", token: 2 });
  state.hover.value = null;
  expect(state.looked.value).toEqual(token);
  state.hold({ ...token });
  expect(state.looked.value).toBeNull();
});

test("playing walks from the first step to the last and stops", async () => {
  vi.useFakeTimers();
  const { state } = await open({ steps: 4 });
  state.play(true, 100);
  const walked = [state.step.value];
  for (let i = 0; i < 8 && state.playing.value; i++) {
    await vi.advanceTimersByTimeAsync(100);
    walked.push(state.step.value);
  }
  expect(walked).toEqual([0, 10, 20, 30, 30]);
  expect(state.playing.value).toBe(false);
});

test("playing waits for the picture", async () => {
  vi.useFakeTimers();
  const { state, madeup } = await open({ steps: 4 });
  const answer = madeup.ask.bind(madeup);
  madeup.ask = async (question) => {
    await new Promise((done) => setTimeout(done, 250));
    return answer(question);
  };
  state.play(true, 100);
  await vi.advanceTimersByTimeAsync(200);
  expect(state.step.value).toBe(0);
  await vi.advanceTimersByTimeAsync(100);
  expect(state.step.value).toBe(10);
});

test("a problem is shown in its own words, and goes when a picture comes", async () => {
  const { state, madeup } = await open({ steps: 3 });
  madeup.run.steps.splice(1, 1);
  state.go(1);
  await settle();
  expect(state.problem.value).toBe("no step 10 in runs/sst2; it has 2 steps.");
  state.go(0);
  await settle();
  expect(state.problem.value).toBe("");
});

test("what is wrong with the run is told until it is heard of again", async () => {
  const { state, madeup } = await open();
  madeup.say(new Problem("a00/x is damaged"));
  expect(state.trouble.value).toBe("a00/x is damaged");
  madeup.train();
  expect(state.trouble.value).toBe("");
});

test("when the server is back, what could not be had is asked for again", async () => {
  const { state, madeup } = await open({ steps: 3 });
  const answer = madeup.ask.bind(madeup);
  madeup.ask = () => Promise.reject(new Gone("no"));
  madeup.say(new Gone("no"));
  state.go(0);
  await settle();
  expect([state.gone.value, state.lines.value?.question.step]).toEqual([true, 20]);
  madeup.ask = answer;
  madeup.say({ steps: [], state: madeup.run.state, scalars: {}, attempt: 0 });
  await settle();
  expect([state.gone.value, state.lines.value?.question.step]).toEqual([false, 0]);
});

test("a new attempt forgets the old one's steps and replies", async () => {
  const { state, madeup } = await open({ steps: 3 });
  madeup.run.attempt = 1;
  madeup.run.steps = [0, 20];
  madeup.run.scalars = { loss: { step: [0], value: [9] } };
  madeup.asked.length = 0;
  madeup.say({ steps: [20], state: madeup.run.state, scalars: {}, attempt: 1 });
  await settle();
  expect(state.steps.value).toEqual([0, 20]);
  expect(state.scalars.value).toEqual({ loss: { step: [0], value: [9] } });
  expect(madeup.asked.map(({ ask }) => ask)).toEqual(expect.arrayContaining(["trial", "lines", "step"]));
});

test("a change that comes while the run is being opened is not lost", async () => {
  const madeup = new Madeup({ steps: 2, state: "training" });
  const life = new AbortController();
  lives.push(life);
  const state = new State(madeup, life.signal);
  madeup.say({ steps: [777], state: madeup.run.state, scalars: {}, attempt: 0 });
  await settle();
  expect(state.steps.value).toEqual([0, 10, 777]);
});

test("seconds pass since the trainer was heard of", async () => {
  vi.useFakeTimers();
  const { state } = await open();
  await vi.advanceTimersByTimeAsync(3000);
  expect(state.age_s.value).toBe(5);
});

test("steps are kept rising, each once", () => {
  expect(union([], [3])).toEqual([3]);
  expect(union([1, 5], [7, 9])).toEqual([1, 5, 7, 9]);
  expect(union([1, 5], [3, 5, 6])).toEqual([1, 3, 5, 6]);
});

test("logged rows are put behind those that are there", () => {
  const old = { loss: { step: [1, 2], value: [0.9, 0.8] } };
  const more = { loss: { step: [2, 3], value: [0.8, null] }, lr: { step: [3], value: [1e-4] } };
  expect(append(old, more)).toEqual({
    loss: { step: [1, 2, 3], value: [0.9, 0.8, null] },
    lr: { step: [3], value: [1e-4] },
  });
  expect(append(old, {})).toEqual(old);
});
