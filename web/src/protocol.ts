/** Questions, replies and problems, as docs/protocol.md has them. */

/** What a view may ask. */
export type Question =
  | { ask: "trial" }
  | { ask: "step"; step: number }
  | { ask: "first_look"; step: number }
  | LinesQuestion;

/** Asks for the `top` heaviest keys of each query of some heads. */
export interface LinesQuestion {
  ask: "lines";
  step: number;
  layer: number;
  example: number;
  heads: number[];
  first: number;
  count: number;
  top: number;
}

/** How the trainer is. */
export interface Life {
  state: "waiting" | "training" | "ended" | "stopped" | "failed";
  step: number | null;
  age_s: number | null;
  alive: boolean;
  message: string;
  skipped: number;
  thinned: number;
}

/** One attention call of the model. */
export interface Layer {
  path: string;
  call: number;
  heads: number;
  kv_heads: number;
  kept: number[] | null;
  route: string;
}

/** The numbers of a layer's heads that the run has. */
export function headsOf(layer: Layer | undefined): number[] {
  return layer?.kept ?? Array.from({ length: layer?.heads ?? 0 }, (_, head) => head);
}

/** One of the fixed examples; its tokens are without padding. */
export interface Example {
  text: string;
  tokens: string[];
  special: boolean[];
  label: number | null;
}

/** Logged numbers by name; null where the value was not finite. */
export type Scalars = Record<string, { step: number[]; value: (number | null)[] }>;

/** Facts of `trial`. */
export interface Run {
  name: string;
  /** Another folder under the same name has another; older servers do not say. */
  run?: string | undefined;
  attempt: number;
  state: Life;
  steps: number[];
  layers: Layer[];
  examples: Example[];
  labels: string[] | null;
  scalars: Scalars;
}

/** Facts of `step`. */
export interface StepFacts {
  step: number;
  predictions: (number | null)[];
  probabilities: (number[] | null)[];
  loss: number | null;
  worst_check: number | null;
  failed: number[];
  forwards: Record<string, number>;
}

/** Facts of `first_look`. */
export interface FirstLook {
  layer: number;
  head: number;
  example: number;
  change: number;
}

/** How far the rebuilt output was from the kernel's own. */
export interface Check {
  error: number | null;
  limit: number | null;
  note: string;
  passed: boolean | null;
}

/** No mask, the kernel's own causal flag, or a tensor. */
export type Mask = "none" | "causal" | "given";

/** Facts of `lines`. */
export interface LinesFacts {
  top: number;
  shown_first: number;
  shown_count: number;
  /** Older servers do not say. */
  mask?: Mask;
  check: Check;
  /** Why the weights are not the tokens' own; empty where they are. */
  withheld?: string;
  route: string;
  dtype: string;
  scale: number | null;
}

/** What is new about a run: the data of one `trial` event. */
export interface Change {
  run?: string | undefined;
  steps: number[];
  state: Life;
  scalars: Scalars;
  attempt: number;
}

/** What is heard of a run: a change, what is wrong with it, or that nobody answers at present. */
export type News = Change | Problem | Gone;

/** An array of a reply, row-major. */
export interface Tensor {
  shape: number[];
  data: Float32Array | Int32Array;
}

/** A decoded reply; `facts` has the type that belongs to the question. */
export interface Reply {
  facts: unknown;
  tensors: Map<string, Tensor>;
  bytes: number;
}

/** Where replies come from: a server, a notebook's comm, or data in the page. */
export interface Source {
  /** Rejects with `Problem` where the question has no answer, with `Gone` where nobody answers. */
  ask(question: Question): Promise<Reply>;
  /** Calls `fn` with what is heard of the run, until `signal` aborts. */
  onTrial(fn: (news: News) => void, signal: AbortSignal): void;
}

/** The question has no answer; the message is for the user as it is. */
export class Problem extends Error {
  override name = "Problem";
}

/** Nobody answers. */
export class Gone extends Error {
  override name = "Gone";
}

const KINDS = { F32: Float32Array, I32: Int32Array };

interface Entry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

/**
 * A reply from its bytes, one safetensors blob.
 *
 * Raises: Problem where the bytes are not a whole reply.
 */
export function decode(buffer: ArrayBuffer): Reply {
  const { __metadata__: metadata, ...entries } = header(buffer);
  const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
  const tensors = new Map<string, Tensor>();
  for (const [name, entry] of Object.entries(entries)) tensors.set(name, tensor(buffer, start, name, entry as Entry));
  const facts = (metadata as Record<string, string> | undefined)?.facts;
  if (facts === undefined) throw new Problem("The reply has no facts.");
  return { facts: JSON.parse(facts), tensors, bytes: buffer.byteLength };
}

function header(buffer: ArrayBuffer): Record<string, unknown> {
  if (buffer.byteLength < 8) throw new Problem(`The reply is cut off after ${buffer.byteLength} bytes.`);
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  if (8 + length > buffer.byteLength) throw new Problem(`The reply is cut off after ${buffer.byteLength} bytes.`);
  return JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
}

function tensor(buffer: ArrayBuffer, start: number, name: string, { dtype, shape, data_offsets }: Entry): Tensor {
  const Kind = KINDS[dtype as keyof typeof KINDS];
  if (!Kind) throw new Problem(`Tensor ${name} of the reply has dtype ${dtype}; only F32 and I32 are read.`);
  const [from, to] = data_offsets;
  const size = shape.reduce((a, b) => a * b, 1);
  if (start + to > buffer.byteLength || to - from !== 4 * size) throw new Problem(`Tensor ${name} is cut off.`);
  // A slice, for the header may end where a typed array must not begin.
  return { shape, data: new Kind(buffer.slice(start + from, start + to)) };
}
