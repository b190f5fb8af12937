/** A made-up run that speaks the real bytes: the dev harness needs no Python, and tests no server. */
import type { Change, Example, Life, LinesQuestion, News, Question, Reply, Run, Source } from "../src/protocol.ts";
import { decode, Problem } from "../src/protocol.ts";

/** What the run is like; each may be given in the harness's address. */
export interface Making {
  name: string;
  run: string;
  attempt: number;
  examples: number;
  layers: number;
  heads: number;
  kv_heads: number;
  tokens: number;
  steps: number;
  style: "bert" | "gpt";
  state: Life["state"];
  message: string;
  withheld: string;
  lost: boolean;
  live: number;
  delay: number;
  looking: number;
  fails: number;
  scalars: number;
}

/** A run of BERT's shape that has ended. */
export const MAKING: Making = {
  name: "runs/sst2",
  run: "5f0c",
  attempt: 0,
  examples: 5,
  layers: 12,
  heads: 12,
  kv_heads: 12,
  tokens: 20,
  steps: 30,
  style: "bert",
  state: "ended",
  message: "",
  withheld: "",
  lost: false,
  live: 0,
  delay: 0,
  looking: 0,
  fails: -1,
  scalars: 1,
};

/** An array to be put into a reply. */
export interface Made {
  dtype: "F32" | "I32";
  shape: number[];
  data: Float32Array | Int32Array;
}

/** One reply's bytes. */
export function encode(facts: unknown, tensors: Record<string, Made> = {}): ArrayBuffer {
  let at = 0;
  const header: Record<string, unknown> = { __metadata__: { facts: JSON.stringify(facts) } };
  for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
    header[name] = { dtype, shape, data_offsets: [at, at + data.byteLength] };
    at += data.byteLength;
  }
  const text = JSON.stringify(header);
  const bytes = new TextEncoder().encode(text.padEnd(text.length + 7));
  const length = bytes.length - (bytes.length % 8);
  const blob = new Uint8Array(8 + length + at);
  new DataView(blob.buffer).setBigUint64(0, BigInt(length), true);
  blob.set(bytes.subarray(0, length), 8);
  at = 8 + length;
  for (const { data } of Object.values(tensors)) {
    blob.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  }
  return blob.buffer;
}

const TEXTS = [
  "an utterly charming film that never once loses faith in its odd little heroes",
  "one long string of clichés , and not even the good ones",
  "the movie is n't bad so much as unnecessary",
  "a quietly devastating portrait of grief , beautifully acted from its first frame to its last , and over before one has had time to find fault with any of it",
  "why did they make this ?",
];

function split(text: string, style: Making["style"]): string[] {
  const words = text.split(" ");
  if (style === "gpt") return words.map((word, i) => (i ? `Ġ${word}` : word));
  const pieces = words.flatMap((word) => (word.length > 8 ? [word.slice(0, 6), `##${word.slice(6)}`] : [word]));
  return ["[CLS]", ...pieces, "[SEP]"];
}

function example(text: string, label: number, { style, tokens: least }: Making): Example {
  let said = text;
  while (split(said, style).length < least) said += ` , and ${text}`;
  const tokens = split(said, style);
  return { text: said, tokens, special: tokens.map((token) => /^\[.*\]$/.test(token)), label };
}

/** A number in [0, 1) that depends on its arguments only. */
function noise(...seeds: number[]): number {
  let x = 2166136261;
  for (const seed of seeds) x = Math.imul(x ^ (seed + 0x9e3779b9), 16777619) ^ (x >>> 13);
  return ((x ^ (x >>> 15)) >>> 0) / 2 ** 32;
}

/** The weights of one query: a head drifts from uniform to its habit while training. */
function attend(layer: number, head: number, query: number, count: number, grown: number, causal: boolean): number[] {
  const habit = Math.floor(4 * noise(layer, head));
  const logits = Array.from({ length: count }, (_, key) => {
    const target = [query - 1, query, 0, Math.floor(noise(layer, head, query) * count)][habit];
    const pull = key === Math.max(0, target) ? 3.6 : -0.16 * Math.abs(key - target);
    return causal && key > query ? Number.NEGATIVE_INFINITY : pull * grown + 1.6 * noise(layer, head, query, key);
  });
  const scaled = logits.map(Math.exp);
  const sum = scaled.reduce((a, b) => a + b, 0);
  return scaled.map((each) => each / sum);
}

function linesReply(question: LinesQuestion, run: Run, making: Making): ArrayBuffer {
  const { step, layer, heads, example, first } = question;
  const length = run.examples[example].tokens.length;
  const count = Math.min(question.count, length - first);
  const top = Math.min(question.top, count);
  const causal = making.style === "gpt";
  const { withheld } = making;
  const passed = layer !== making.fails;
  const check = { error: passed ? 3e-7 : 0.4, limit: 0.02, note: "", passed };
  const said = { top, shown_first: first, shown_count: count, mask: causal ? "causal" : "given", check, withheld };
  const facts = { ...said, route: run.layers[layer].route, dtype: "float16", scale: 0.125 };
  const shape = passed && !withheld ? [heads.length, count, top] : [0, 0, 0];
  const weight = new Float32Array(shape[0] * shape[1] * shape[2]);
  const key = new Int32Array(weight.length).fill(-1);
  const share = new Float32Array(shape[0] * shape[1]);
  const grown = 1 - 0.98 ** step;
  for (let row = 0; row < share.length; row++) {
    const all = attend(layer, heads[Math.floor(row / count)], first + (row % count), length, grown, causal);
    const window = all.slice(first, first + count).map((w, i) => ({ w, key: first + i }));
    const best = window.filter(({ w }) => w > 0).sort((a, b) => b.w - a.w);
    for (const [i, each] of best.slice(0, top).entries()) {
      weight[row * top + i] = each.w;
      key[row * top + i] = each.key;
      share[row] += each.w;
    }
  }
  return encode(facts, {
    weight: { dtype: "F32", shape, data: weight },
    key: { dtype: "I32", shape, data: key },
    share: { dtype: "F32", shape: shape.slice(0, 2), data: share },
  });
}

const SPACING = 10;

function lossAt(step: number): number {
  return 0.08 + 0.62 * Math.exp(-step / 150) + 0.05 * (noise(step, 7) - 0.5);
}

function scalarsFrom(from: number, to: number, { scalars }: Making): Run["scalars"] {
  const step = Array.from({ length: Math.max(0, to - from + 1) }, (_, i) => from + i);
  const all = { loss: step.map(lossAt), lr: step.map((each) => 2e-5 * Math.min(1, each / 50)) };
  const names = (["loss", "lr"] as const).slice(0, scalars);
  return Object.fromEntries(names.map((name) => [name, { step, value: all[name] }]));
}

/** A run and its server in one, for the page's own process. */
export class Madeup implements Source {
  run: Run;
  readonly asked: Question[] = [];
  #making: Making;
  #listeners = new Set<(news: News) => void>();

  constructor(making: Partial<Making> = {}) {
    this.#making = { ...MAKING, ...making };
    const { name, run, attempt, state, examples, layers, heads, kv_heads, steps } = this.#making;
    const path = (i: number) =>
      this.#making.style === "gpt" ? `transformer.h.${i}.attn` : `bert.encoder.layer.${i}.attention.self`;
    const newest = (steps - 1) * SPACING;
    this.run = {
      name,
      run,
      attempt,
      state: this.#life(newest),
      steps: Array.from({ length: steps }, (_, i) => i * SPACING),
      layers: Array.from({ length: layers }, (_, i) => ({
        path: path(i),
        call: 0,
        heads,
        kv_heads,
        kept: null,
        route: "transformers:sdpa",
      })),
      examples: Array.from({ length: examples }, (_, i) => example(TEXTS[i % TEXTS.length], (i + 1) % 2, this.#making)),
      labels: ["negative", "positive"],
      scalars: scalarsFrom(0, newest, this.#making),
    };
    // Before the first file is there, a run has neither.
    if (!steps) this.run.layers = [];
    if (state === "waiting") this.run.examples = [];
  }

  async ask(question: Question): Promise<Reply> {
    this.asked.push(question);
    const pause = question.ask === "first_look" ? this.#making.looking : this.#making.delay;
    if (pause) await new Promise((done) => setTimeout(done, pause));
    return decode(this.#answer(question));
  }

  onTrial(fn: (news: News) => void, signal: AbortSignal): void {
    this.#listeners.add(fn);
    signal.addEventListener("abort", () => this.#listeners.delete(fn));
  }

  /** Tells every listener. */
  say(news: News): void {
    for (const fn of this.#listeners) fn(news);
  }

  /** Trains on to the next step. */
  train(): void {
    const before = this.run.steps.at(-1) ?? -SPACING;
    const step = before + SPACING;
    this.run.steps.push(step);
    this.run.state = this.#life(step);
    if (!this.run.layers.length) {
      const { layers, examples } = new Madeup({ ...this.#making, steps: 1, state: "training" }).run;
      this.run = { ...this.run, layers, examples };
    }
    const scalars = scalarsFrom(before + 1, step, this.#making);
    this.say(this.change({ steps: [step], scalars }));
  }

  /** Is another run from here on; says so by its first change. */
  become(making: Partial<Making>): void {
    this.#making = { ...this.#making, ...making };
    this.run = new Madeup(this.#making).run;
    const { steps, scalars } = this.run;
    this.say(this.change({ steps, scalars }));
  }

  /** What a change says of the run as it is, with what is new. */
  change(fresh: Partial<Change> = {}): Change {
    const { run, attempt, state } = this.run;
    return { run, attempt, state, steps: [], scalars: {}, ...fresh };
  }

  #life(step: number): Life {
    const { state, lost, message: given } = this.#making;
    const message = given || (state === "failed" ? "CUDA out of memory" : "");
    return {
      state,
      step: step < 0 ? null : step,
      age_s: lost ? 190 : 2,
      alive: !lost,
      message,
      skipped: 0,
      thinned: 0,
    };
  }

  #answer(question: Question): ArrayBuffer {
    const { run } = this;
    if (question.ask === "trial") return encode(run);
    if (!run.steps.includes(question.step))
      throw new Problem(`no step ${question.step} in ${run.name}; it has ${run.steps.length} steps.`);
    if (question.ask === "lines") return linesReply(question, run, this.#making);
    if (question.ask === "first_look")
      return encode({
        layer: Math.min(3, run.layers.length - 1),
        head: 7 % this.#making.heads,
        example: Math.min(1, run.examples.length - 1),
        change: 0.11,
      });
    return encode({
      step: question.step,
      predictions: run.examples.map((_, i) => (noise(i, question.step) < 0.7 ? (i + 1) % 2 : i % 2)),
      probabilities: run.examples.map((_, i) => [0.18 + 0.1 * (i % 5), 0.82 - 0.1 * (i % 5)]),
      loss: lossAt(question.step),
      worst_check: this.#making.fails < 0 ? 3e-7 : 0.4,
      failed: this.#making.fails < 0 ? [] : [this.#making.fails],
      forwards: { train: question.step },
    });
  }
}

/** The run that an address asks for: `?steps=1000&style=gpt&live=500`. */
export function fromAddress(search: string): Madeup {
  const given = Object.entries(MAKING).flatMap(([name, usual]) => {
    const said = new URLSearchParams(search).get(name);
    if (said === null) return [];
    return [[name, typeof usual === "number" ? Number(said) : typeof usual === "boolean" ? said !== "" : said]];
  });
  const making: Partial<Making> = Object.fromEntries(given);
  const madeup = new Madeup(making);
  if (making.live) setInterval(() => madeup.train(), making.live);
  return madeup;
}
