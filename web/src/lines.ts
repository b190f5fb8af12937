/** What a `lines` reply says: which query looks at which key, and how much. */
import {
  type Example,
  headsOf,
  type Layer,
  type LinesFacts,
  type LinesQuestion,
  Problem,
  type Reply,
} from "./protocol.ts";

/**
 * The picture of one reply: its question, its facts and its arrays.
 *
 * Shapes: `weight` and `key` (heads, count, top), `share` (heads, count).
 */
export interface Lines extends LinesFacts {
  question: LinesQuestion;
  weight: Float32Array;
  key: Int32Array;
  share: Float32Array;
}

/** A token on one side of the picture. */
export interface Focus {
  side: "query" | "key";
  token: number;
}

/** One weight. `slot` is the head's place in the question's list; tokens are indices into the example. */
export interface Look {
  slot: number;
  query: number;
  key: number;
  weight: number;
}

/** Lines to draw, lightest first, and the part of the whole mass that they hold. */
export interface Strokes {
  looks: Look[];
  share: number;
}

/** Weights below are not drawn, nor more lines than that. */
export const LEAST = 0.005;
export const MOST = 4000;

/** Reads a reply to `question`. */
export function readLines(question: LinesQuestion, reply: Reply): Lines {
  const facts = reply.facts as LinesFacts;
  if (withheld(facts))
    return { ...facts, question, weight: new Float32Array(), key: new Int32Array(), share: new Float32Array() };
  const array = (name: string) => {
    const found = reply.tensors.get(name);
    if (!found) throw new Problem(`The reply has no tensor ${name}.`);
    return found.data;
  };
  const weight = array("weight") as Float32Array;
  const key = array("key") as Int32Array;
  const share = array("share") as Float32Array;
  const rows = question.heads.length * facts.shown_count;
  const whole = weight.length === rows * facts.top && key.length === weight.length && share.length === rows;
  if (!whole) throw new Problem("The reply's arrays do not fit its facts.");
  return { ...facts, question, weight, key, share };
}

/** Whether there are no weights to draw: the layer failed its self-check, or they are not the tokens' own. */
export function withheld({ check, withheld: why }: LinesFacts): boolean {
  return check.passed === false || Boolean(why);
}

type Each = (slot: number, query: number, key: number, weight: number) => void;

/** Calls `fn` with each weight of the reply, or of one query only. */
function each(lines: Lines, query: number | null, fn: Each): void {
  if (withheld(lines)) return;
  const { shown_first: first, shown_count: count, top } = lines;
  const from = query === null ? 0 : query - first;
  const to = query === null ? count : from + 1;
  if (from < 0 || to > count) return;
  for (let slot = 0; slot < lines.question.heads.length; slot++)
    for (let q = from; q < to; q++)
      for (let i = (slot * count + q) * top; i < (slot * count + q + 1) * top; i++)
        if (lines.key[i] >= 0) fn(slot, first + q, lines.key[i], lines.weight[i]);
}

function concerns(focus: Focus | null, query: number, key: number): boolean {
  return !focus || (focus.side === "query" ? query : key) === focus.token;
}

/** Every weight of the focused token, heaviest first. */
export function looksOf(lines: Lines, focus: Focus): Look[] {
  const looks: Look[] = [];
  each(lines, focus.side === "query" ? focus.token : null, (slot, query, key, weight) => {
    if (concerns(focus, query, key)) looks.push({ slot, query, key, weight });
  });
  return looks.sort((a, b) => b.weight - a.weight);
}

/** What is drawn of the reply, or of the focused token alone. */
export function strokesOf(lines: Lines, focus: Focus | null, least = LEAST, most = MOST): Strokes {
  const row = (slot: number, query: number) => slot * lines.shown_count + query - lines.shown_first;
  const kept: Look[] = [];
  const held = new Float64Array(lines.share.length);
  const drawn = new Float64Array(lines.share.length);
  each(lines, focus?.side === "query" ? focus.token : null, (slot, query, key, weight) => {
    held[row(slot, query)] += weight;
    if (weight >= least && concerns(focus, query, key)) kept.push({ slot, query, key, weight });
  });
  const looks = kept.sort((a, b) => a.weight - b.weight).slice(-most);
  for (const { slot, query, weight } of looks) drawn[row(slot, query)] += weight;
  return { looks, share: meanShare(lines.share, held, drawn) };
}

function meanShare(share: Float32Array, held: Float64Array, drawn: Float64Array): number {
  let sum = 0;
  let rows = 0;
  for (let row = 0; row < share.length; row++) {
    if (held[row] === 0) continue;
    sum += (share[row] * drawn[row]) / held[row];
    rows++;
  }
  return rows ? sum / rows : 0;
}

/** The focus, if its token is in the picture. */
export function inside(focus: Focus | null, { shown_first: first, shown_count: count }: Lines): Focus | null {
  return focus && focus.token >= first && focus.token < first + count ? focus : null;
}

/** Where an arrow key leads: up and down within a side, across along the heaviest line. */
export function neighbour(lines: Lines, focus: Focus | null, key: string): Focus | null {
  const { shown_first: first, shown_count: count } = lines;
  if (!focus)
    return { side: key === "ArrowRight" ? "key" : "query", token: key === "ArrowUp" ? first + count - 1 : first };
  if (key === "ArrowUp") return { ...focus, token: Math.max(first, focus.token - 1) };
  if (key === "ArrowDown") return { ...focus, token: Math.min(first + count - 1, focus.token + 1) };
  const side = key === "ArrowRight" ? "key" : "query";
  if (side === focus.side) return null;
  return { side, token: looksOf(lines, focus)[0]?.[side] ?? focus.token };
}

/** Which tokens are drawn, on both sides. */
export interface Window {
  first: number;
  count: number;
}

/** What there is of a wished window in an example of so many tokens. */
export function windowOf({ first, count }: Window, tokens: number): Window {
  const from = first < tokens ? first : 0;
  return { first: from, count: Math.min(count, tokens - from) };
}

/** The question for a picture, with what does not fit the layer or the example cut to it. */
export function questionOf(layer: Layer, example: Example, wanted: Omit<LinesQuestion, "ask" | "top">): LinesQuestion {
  const shown = windowOf(wanted, example.tokens.length);
  const all = headsOf(layer);
  const heads = wanted.heads.filter((head) => all.includes(head));
  return {
    ...wanted,
    ask: "lines",
    heads: heads.length ? heads : [all[0] ?? 0],
    ...shown,
    top: Math.min(shown.count, 64),
  };
}
