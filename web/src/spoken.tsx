/** The line over the picture that says in words what is looked at. */
import { type Lines, withheld } from "./lines.ts";
import type { LinesQuestion } from "./protocol.ts";
import type { State } from "./state.ts";
import { headsText, weightText, whole } from "./words.ts";

const SPOKEN = 3;

/** What is shown, or whom the focused token looks at. */
export function Spoken({ state }: { state: State }) {
  const lines = state.lines.value;
  const said = lines && !withheld(lines) ? (spokenFocus(state, lines) ?? spokenPicture(state, lines)) : null;
  return <output class="spoken">{said}</output>;
}

function spokenPicture(state: State, { question }: Lines): string {
  const what = `Layer ${question.layer}, ${headsText(question.heads)}, step ${whole(question.step)}`;
  return `${what}${whyOpened(state, question)}. Point at a token, or press an arrow key.`;
}

function whyOpened(state: State, { layer, heads, example }: LinesQuestion): string {
  const look = state.opened.value;
  const same = look?.layer === layer && look.example === example && heads.length === 1 && heads[0] === look.head;
  return same ? ` (what had changed most by step ${whole(look.step)})` : "";
}

function spokenFocus(state: State, lines: Lines): string | null {
  const focus = state.looked.value;
  const tokens = state.run.value?.examples[lines.question.example]?.tokens;
  if (!focus || !tokens) return null;
  const other = focus.side === "query" ? "key" : "query";
  const several = lines.question.heads.length > 1;
  const looks = state.looks.value.slice(0, SPOKEN).map((look) => {
    const head = several ? ` (head ${lines.question.heads[look.slot]})` : "";
    return `“${tokens[look[other]]}” ${weightText(look.weight)}${head}`;
  });
  const verb = focus.side === "query" ? "looks at" : "is looked at by";
  return looks.length ? `“${tokens[focus.token]}” ${verb} ${looks.join(", ")}` : null;
}
