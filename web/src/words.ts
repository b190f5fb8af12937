/** What is said in words and how numbers are written. */
import type { Check, Example, Life, LinesFacts, Mask, StepFacts } from "./protocol.ts";

/** "3,000" */
export function whole(count: number): string {
  return count.toLocaleString("en");
}

/** A weight, to four places. */
export function weightText(weight: number): string {
  if (weight === 0) return "0";
  return weight < 0.00005 ? "<0.0001" : weight.toFixed(4);
}

/** A part, in whole percent; 100 % only where nothing is missing that a percent would show. */
export function percent(part: number): string {
  const rounded = Math.round(100 * part);
  return rounded === 100 && part < 0.9995 ? "> 99 %" : `${rounded} %`;
}

/** An error: "3e-7", "0.4". */
export function errorText(error: number): string {
  if (error === 0) return "0";
  return error < 0.001 ? error.toExponential(0) : String(Number(error.toPrecision(2)));
}

/** A logged number: four digits, whatever its size. */
export function scalarText(value: number): string {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

/** "2 s", "3 minutes", "2 hours" */
export function duration(seconds: number): string {
  if (seconds < 60) return `${Math.max(0, Math.floor(seconds))} s`;
  const [size, name] = seconds < 3600 ? [60, "minute"] : seconds < 86400 ? [3600, "hour"] : [86400, "day"];
  const count = Math.floor(seconds / size);
  return `${count} ${name}${count === 1 ? "" : "s"}`;
}

/** How the trainer is, in a sentence; `age_s` is how long ago it was last heard of. */
export function lifeText(life: Life, name: string, age_s: number): string {
  const step = whole(life.step ?? 0);
  const how = life.message ? `: ${life.message}` : ` at step ${step}.`;
  const skipped = life.skipped ? ` · ${whole(life.skipped)} captures skipped` : "";
  if (life.state === "ended") return `Training ended at step ${step}.${skipped}`;
  if (life.state === "stopped") return `Training was stopped${how}${skipped}`;
  if (life.state === "failed") return `Training failed${how}${skipped}`;
  if (!life.alive && life.state === "training")
    return `No sign of the trainer for ${duration(age_s)}; ${life.step === null ? "no step yet" : `last step ${step}`}.`;
  if (life.state === "training" && life.step === null && life.message)
    return `training · no step yet · ${duration(age_s)} ago${skipped}`;
  if (life.state === "waiting" || life.step === null) return `Waiting for the first step of ${name}.`;
  return `training · step ${step} · ${duration(age_s)} ago${skipped}`;
}

/** What the trainer said of itself, where the sentence about it does not. */
export function lifeNote({ state, message }: Life): string {
  return state === "failed" || state === "stopped" ? "" : message;
}

/** The self-check of a whole step, in a few words. */
export function stepCheckText(facts: StepFacts): string {
  const { failed, worst_check: worst } = facts;
  if (failed.length) return `self-check failed in ${failed.length === 1 ? "layer" : "layers"} ${failed.join(", ")}`;
  return worst === null ? "no self-check" : `self-check ${errorText(worst)}`;
}

/** The self-check of one layer. */
export function checkText(check: Check): string {
  if (check.error === null) return check.note || "unchecked";
  return check.limit === null ? errorText(check.error) : `${errorText(check.error)} (limit ${errorText(check.limit)})`;
}

/** Why a run has no picture at all. */
export function nothingText(name: string, life: Life, steps: number): string {
  if (life.message) return life.message;
  if (steps) return "This run has no attention on fixed examples to show.";
  const over = life.state === "ended" || life.state === "stopped" || life.state === "failed";
  return over ? "Training is over, and no step was captured." : `Waiting for the first step of ${name}.`;
}

/** "1 more token after these", "" where all are there. */
export function moreText(before: number, after: number): string {
  const tokens = (count: number) => `${whole(count)} more ${count === 1 ? "token" : "tokens"}`;
  if (before && after) return `${tokens(before)} before these, ${whole(after)} after`;
  if (before) return `${tokens(before)} before these`;
  return after ? `${tokens(after)} after these` : "";
}

/** What queries are kept from looking at. */
export function maskText(mask: Mask = "given"): string {
  return mask === "given" ? "given as a tensor" : mask;
}

/** Why there is no picture. */
export function withheldText(layer: number, { check, withheld }: LinesFacts): string {
  if (withheld) return withheld;
  const error = check.error === null ? "" : ` (${errorText(check.error)})`;
  return `Layer ${layer} failed its self-check${error}: not drawn.`;
}

/** What the model said of one example. */
export interface Verdict {
  predicted: string;
  probability: number | null;
  label: string | null;
  right: boolean | null;
}

/** Prediction against label, or null where there is no class to speak of. */
export function verdict(facts: StepFacts, index: number, example: Example, labels: string[] | null): Verdict | null {
  const predicted = facts.predictions[index] ?? null;
  if (predicted === null) return null;
  const name = (label: number) => labels?.[label] ?? `class ${label}`;
  return {
    predicted: name(predicted),
    probability: facts.probabilities[index]?.[predicted] ?? null,
    label: example.label === null ? null : name(example.label),
    right: example.label === null ? null : example.label === predicted,
  };
}

/** A token's sub-word mark and the rest. */
export function splitToken(token: string): { mark: string; text: string } {
  const mark = /^(##(?=.)|[Ġ▁Ċ]+|\s+)/u.exec(token)?.[0] ?? "";
  return { mark: mark.replace(/\s/gu, "␣"), text: token.slice(mark.length) };
}

/** "head 3", "heads 3, 5", "12 heads" */
export function headsText(heads: readonly number[]): string {
  if (heads.length > 6) return `${heads.length} heads`;
  return `${heads.length === 1 ? "head" : "heads"} ${heads.join(", ")}`;
}
