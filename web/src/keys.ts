/** The keys, the same wherever the view is. */

/** What a key does. */
export type Deed =
  | "token"
  | "head-"
  | "head+"
  | "layer-"
  | "layer+"
  | "step-"
  | "step+"
  | "play"
  | "follow"
  | "all"
  | "clear"
  | "help";

/** The list that `?` shows. */
export const KEYS: readonly { keys: string[]; says: string }[] = [
  { keys: ["↑", "↓"], says: "previous, next token" },
  { keys: ["→", "←"], says: "to the key it looks at most, and back to the query" },
  { keys: ["Enter"], says: "hold the token, or let it go" },
  { keys: ["[", "]"], says: "previous, next head" },
  { keys: ["{", "}"], says: "previous, next layer" },
  { keys: [",", "."], says: "previous, next step" },
  { keys: ["Space"], says: "play the steps, or pause" },
  { keys: ["f"], says: "follow the newest step" },
  { keys: ["a"], says: "all heads, and back" },
  { keys: ["Shift", "Click"], says: "on a head: add it to those shown" },
  { keys: ["Esc"], says: "let go of every token" },
  { keys: ["?"], says: "this list" },
];

const DEEDS: Record<string, Deed> = {
  ArrowUp: "token",
  ArrowDown: "token",
  ArrowLeft: "token",
  ArrowRight: "token",
  "[": "head-",
  "]": "head+",
  "{": "layer-",
  "}": "layer+",
  ",": "step-",
  ".": "step+",
  " ": "play",
  f: "follow",
  a: "all",
  Escape: "clear",
  "?": "help",
};

/** What a control does with these keys itself. */
const OWN: Record<string, Deed[]> = {
  select: ["token", "play"],
  "input:number": ["token", "step-", "step+"],
  "input:range": ["token"],
  button: ["play"],
  summary: ["play"],
};

/** A key press, as far as it matters here. */
export type Press = Pick<KeyboardEvent, "key" | "ctrlKey" | "metaKey" | "altKey" | "getModifierState">;

/**
 * What a key press does, null where it belongs to the browser or to the control that has the focus.
 *
 * Args:
 *   control: the focused element's name, with the type of an input: "select", "input:range", "div".
 */
export function deed(press: Press, control: string): Deed | null {
  // With AltGr, which many keyboards need for brackets, Windows says Ctrl and Alt as well.
  if ((press.ctrlKey || press.metaKey || press.altKey) && !press.getModifierState("AltGraph")) return null;
  const found = DEEDS[press.key] ?? null;
  return found && !OWN[control]?.includes(found) ? found : null;
}
