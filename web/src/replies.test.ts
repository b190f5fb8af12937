import { expect, test } from "vitest";
import type { Question, Reply, Source } from "./protocol.ts";
import { Newest, Replies } from "./replies.ts";

type Step = { ask: "step"; step: number };
const step = (number: number): Step => ({ ask: "step", step: number });

/** A source that answers when told to. */
function slow(bytes = 1) {
  const waiting: { question: Question; answer: () => void; refuse: (error: Error) => void }[] = [];
  const source: Source = {
    ask: (question) =>
      new Promise((resolve, reject) => {
        const reply: Reply = { facts: question, tensors: new Map(), bytes };
        waiting.push({ question, answer: () => resolve(reply), refuse: reject });
      }),
    onTrial: () => {},
  };
  return { source, waiting };
}

const settle = () => new Promise((done) => setTimeout(done));

function newest(source: Source) {
  const shown: number[] = [];
  const failed: unknown[] = [];
  const asker = new Newest<Step>(
    new Replies(source),
    (question) => shown.push(question.step),
    (error) => failed.push(error),
  );
  return { asker, shown, failed };
}

test("one question is in flight, and the newest is next", async () => {
  const { source, waiting } = slow();
  const { asker, shown } = newest(source);
  for (const number of [1, 2, 3, 4]) asker.ask(step(number));
  expect(waiting.map(({ question }) => question)).toEqual([step(1)]);
  waiting[0].answer();
  await settle();
  expect(waiting.map(({ question }) => question)).toEqual([step(1), step(4)]);
  waiting[1].answer();
  await settle();
  expect(shown).toEqual([1, 4]);
});

test("a reply at hand is shown at once, and what was in flight no longer", async () => {
  const { source, waiting } = slow();
  const { asker, shown } = newest(source);
  asker.ask(step(1));
  waiting[0].answer();
  await settle();
  asker.ask(step(2));
  asker.ask(step(1));
  expect(shown).toEqual([1, 1]);
  waiting[1].answer();
  await settle();
  expect(shown).toEqual([1, 1]);
  expect(waiting).toHaveLength(2);
});

test("a failure is told, and the next question is asked", async () => {
  const { source, waiting } = slow();
  const { asker, shown, failed } = newest(source);
  asker.ask(step(1));
  asker.ask(step(2));
  waiting[0].refuse(new Error("no step 1"));
  await settle();
  waiting[1].answer();
  await settle();
  expect(failed).toEqual([new Error("no step 1")]);
  expect(shown).toEqual([2]);
});

test("what was let go of is not shown", async () => {
  const { source, waiting } = slow();
  const { asker, shown } = newest(source);
  asker.ask(step(1));
  asker.ask(step(2));
  asker.forget();
  waiting[0].answer();
  await settle();
  expect(shown).toEqual([]);
  expect(waiting).toHaveLength(1);
});

test("of too many replies those not used for longest go", async () => {
  const { source, waiting } = slow(40);
  const replies = new Replies(source, 100);
  for (const number of [1, 2, 3]) {
    const asked = replies.ask(step(number));
    waiting[number - 1].answer();
    await asked;
    replies.kept(step(1));
  }
  expect([1, 2, 3].map((number) => replies.kept(step(number)) !== undefined)).toEqual([true, false, true]);
});

test("a reply larger than all room is kept as long as it is the last", async () => {
  const { source, waiting } = slow(200);
  const replies = new Replies(source, 100);
  const asked = replies.ask(step(1));
  waiting[0].answer();
  await asked;
  expect(replies.kept(step(1))).toBeDefined();
});
