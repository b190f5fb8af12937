import { afterEach, expect, test, vi } from "vitest";
import { Madeup, type Making } from "../dev/madeup.ts";
import { Gone, type LinesQuestion, Problem } from "./protocol.ts";
import { append, fitted, replaced, State, union } from "./state.ts";

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
  madeup.say(madeup.change());
  await settle();
  expect([state.gone.value, state.lines.value?.question.step]).toEqual([false, 0]);
});

test("a new attempt forgets the old one's steps and replies", async () => {
  const { state, madeup } = await open({ steps: 3 });
  madeup.run.attempt = 1;
  madeup.run.steps = [0, 20];
  madeup.run.scalars = { loss: { step: [0], value: [9] } };
  madeup.asked.length = 0;
  madeup.say(madeup.change({ steps: [20] }));
  await settle();
  expect(state.steps.value).toEqual([0, 20]);
  expect(state.scalars.value).toEqual({ loss: { step: [0], value: [9] } });
  expect(madeup.asked.map(({ ask }) => ask)).toEqual(expect.arrayContaining(["trial", "lines", "step"]));
});

const small = { layers: 2, heads: 2, examples: 1, tokens: 3, steps: 2 };

test("a new attempt with less of everything moves the picks to what there is", async () => {
  const { state, madeup } = await open({ steps: 3 });
  state.pick({ layer: 3, heads: [5, 11], example: 4, first: 12 });
  await settle();
  madeup.become({ ...small, attempt: 1 });
  await settle();
  expect(state.picks.value).toMatchObject({ layer: 1, heads: [0], example: 0 });
  const tokens = madeup.run.examples[0].tokens.length;
  const shown = { step: 10, layer: 1, heads: [0], example: 0, first: 12, count: tokens - 12 };
  expect(state.lines.value?.question).toMatchObject(shown);
  expect(madeup.asked.filter(({ ask }) => ask === "first_look")).toHaveLength(1);
});

test("a new attempt is looked at anew where nobody has picked", async () => {
  const { state, madeup } = await open({ steps: 3 });
  madeup.become({ ...small, heads: 4, attempt: 1 });
  await settle();
  expect(state.lines.value?.question).toMatchObject({ step: 10, layer: 1, heads: [3], example: 0 });
  expect(state.opened.value).toMatchObject({ layer: 1, step: 10 });
  expect(madeup.asked.filter(({ ask }) => ask === "first_look")).toHaveLength(2);
});

test("a late first look at another run moves nothing", async () => {
  vi.useFakeTimers();
  const { state, madeup } = await open({ steps: 3, looking: 5000 });
  await vi.advanceTimersByTimeAsync(1000);
  madeup.become({ attempt: 1, looking: 60_000 });
  await vi.advanceTimersByTimeAsync(10_000);
  expect([state.opened.value, state.picks.value.layer]).toEqual([null, 0]);
  expect(state.lines.value?.question).toMatchObject({ step: 20, layer: 0 });
});

test("steps that were thinned are left for the nearest before, or the first", async () => {
  const { state, madeup } = await open({ steps: 5 });
  const thin = (steps: number[], thinned: number) => {
    madeup.run.steps = steps;
    madeup.run.state = { ...madeup.run.state, thinned };
    madeup.say(madeup.change());
  };
  state.go(3);
  thin([10, 20, 40], 1);
  await settle();
  expect([state.step.value, state.steps.value]).toEqual([20, [10, 20, 40]]);
  state.go(0);
  thin([20, 40], 2);
  await settle();
  expect([state.step.value, state.following.value]).toEqual([20, false]);
});

test("a run deleted and trained again under the same number is another run", async () => {
  const { state, madeup } = await open({ steps: 5 });
  state.go(1);
  state.hold({ side: "query", token: 3 });
  await settle();
  madeup.asked.length = 0;
  madeup.become({ ...small, run: "77aa" });
  await settle();
  expect(madeup.asked[0]).toEqual({ ask: "trial" });
  expect(state.steps.value).toEqual([0, 10]);
  expect(state.scalars.value.loss.step).toHaveLength(11);
  expect([state.step.value, state.following.value, state.pin.value]).toEqual([10, true, null]);
  expect([state.lines.value?.question.step, state.facts.value?.step]).toEqual([10, 10]);
});

test.each([
  ["by a server that names runs", "5f0c", ""],
  ["by an older server", undefined, undefined],
])("while the run is gone there is no old picture, %s", async (_, before, meanwhile) => {
  const { state, madeup } = await open({ steps: 3 });
  madeup.run.run = before;
  const { name } = madeup.run;
  madeup.become({ steps: 0, state: "waiting" });
  madeup.run.run = meanwhile;
  expect([state.lines.value, state.facts.value, state.step.value]).toEqual([null, null, null]);
  await settle();
  expect([state.steps.value, state.scalars.value, state.lines.value]).toEqual([[], {}, null]);
  expect([state.run.value?.name, state.life.value?.state]).toEqual([name, "waiting"]);
  madeup.become({ ...small, run: "77aa", state: "training" });
  await settle();
  expect([state.steps.value, state.lines.value?.question.step]).toEqual([[0, 10], 10]);
});

test("a page that was refused opens the run at the next event", async () => {
  const madeup = new Madeup({ steps: 3, state: "training" });
  const answer = madeup.ask.bind(madeup);
  madeup.ask = () => Promise.reject(new Problem("no run here"));
  const life = new AbortController();
  lives.push(life);
  const state = new State(madeup, life.signal);
  await settle();
  expect([state.problem.value, state.run.value]).toEqual(["no run here", null]);
  madeup.ask = answer;
  madeup.say(madeup.change());
  await settle();
  expect([state.problem.value, state.lines.value?.question.step]).toEqual(["", 20]);
});

test("another run that cannot be opened yet leaves no old picture, and is opened at the next event", async () => {
  const { state, madeup } = await open({ steps: 3 });
  const answer = madeup.ask.bind(madeup);
  madeup.ask = () => Promise.reject(new Problem("damaged"));
  madeup.become({ run: "77aa" });
  await settle();
  expect([state.problem.value, state.lines.value]).toEqual(["damaged", null]);
  madeup.ask = answer;
  madeup.say(madeup.change());
  await settle();
  expect([state.problem.value, state.lines.value?.question.step]).toEqual(["", 20]);
});

test("a picture that was refused is asked for again at the next event", async () => {
  const { state, madeup } = await open({ steps: 3 });
  const answer = madeup.ask.bind(madeup);
  madeup.ask = () => Promise.reject(new Problem("no such step"));
  state.go(0);
  await settle();
  expect([state.problem.value, state.lines.value?.question.step]).toEqual(["no such step", 20]);
  madeup.ask = answer;
  madeup.say(madeup.change());
  await settle();
  expect([state.problem.value, state.lines.value?.question.step]).toEqual(["", 0]);
});

test("a run without attention has its reason to tell", async () => {
  const message = "NO ATTENTION WAS CAUGHT in Net: it calls none";
  const { state } = await open({ steps: 0, message });
  expect([state.lines.value, state.life.value?.message]).toEqual([null, message]);
});

test("weights that are withheld come with their reason", async () => {
  const { state } = await open({ withheld: "Keys are patches." });
  expect(state.lines.value?.withheld).toBe("Keys are patches.");
  expect(state.strokes.value.looks).toEqual([]);
});

test("a wish for more tokens than there are is remembered", async () => {
  const { state } = await open({ tokens: 3 });
  state.pick({ example: 4, count: 20 });
  expect(state.window.value).toEqual({ first: 0, count: state.tokens.value });
  expect(state.tokens.value).toBeLessThan(20);
  state.pick({ example: 3 });
  expect(state.window.value).toEqual({ first: 0, count: 20 });
});

test("a first look that takes long does not keep the page blank", async () => {
  vi.useFakeTimers();
  const { state, lines } = await open({ steps: 3, looking: 5000 });
  await vi.advanceTimersByTimeAsync(200);
  expect(state.lines.value?.question).toMatchObject({ step: 20, layer: 0, heads: [0], example: 0 });
  await vi.advanceTimersByTimeAsync(5000);
  expect(state.lines.value?.question).toMatchObject({ step: 20, layer: 3, heads: [7], example: 1 });
  expect(lines()).toHaveLength(2);
});

test("nor does it move who has picked meanwhile, who waits for nothing", async () => {
  vi.useFakeTimers();
  const { state } = await open({ steps: 3, looking: 5000 });
  state.pick({ layer: 2 });
  await vi.advanceTimersByTimeAsync(0);
  expect(state.lines.value?.question.layer).toBe(2);
  await vi.advanceTimersByTimeAsync(6000);
  expect([state.lines.value?.question.layer, state.opened.value]).toEqual([2, null]);
});

test("picks stay as they are while the run has nothing", () => {
  const picks = { layer: 5, heads: [7], example: 3, first: 4, count: 20 };
  expect(fitted(picks, null)).toEqual(picks);
  expect(fitted(picks, { ...new Madeup({ steps: 0 }).run, examples: [] })).toEqual(picks);
});

test("another attempt, folder or nothing any more is another run; what is not said is no difference", () => {
  const { run } = new Madeup();
  const now = { ...run, scalars: {} };
  const waiting = { ...run.state, state: "waiting" as const };
  expect(replaced(run, [0], now)).toBe(false);
  expect(replaced(run, [0], { ...now, run: undefined })).toBe(false);
  expect(replaced({ ...run, run: undefined }, [0], now)).toBe(false);
  expect(replaced(run, [0], { ...now, run: "77aa" })).toBe(true);
  expect(replaced(run, [0], { ...now, attempt: 1 })).toBe(true);
  expect(replaced(run, [0], { ...now, state: waiting })).toBe(true);
  expect(replaced(run, [], { ...now, state: waiting })).toBe(false);
});

test("a change that comes while the run is being opened is not lost", async () => {
  const madeup = new Madeup({ steps: 2, state: "training" });
  const life = new AbortController();
  lives.push(life);
  const state = new State(madeup, life.signal);
  madeup.say(madeup.change({ steps: [777] }));
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
