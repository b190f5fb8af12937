/** The left side: which example. */
import { useLayoutEffect, useRef } from "preact/hooks";
import type { Example } from "./protocol.ts";
import { Side } from "./side.tsx";
import type { State } from "./state.ts";
import { type Verdict, verdict } from "./words.ts";

/** The fixed examples with what the model says of them at this step. */
export function Examples({ state, narrow }: { state: State; narrow: boolean }) {
  const run = state.run.value;
  const facts = state.facts.value;
  const chosen = state.picks.value.example;
  const examples = run?.examples ?? [];
  const list = useRef<HTMLOListElement>(null);
  useLayoutEffect(() => {
    if (!narrow) reveal(list.current?.children[chosen]);
  }, [chosen, examples.length, narrow]);
  const verdicts = examples.map((each, i) => (facts ? verdict(facts, i, each, run?.labels ?? null) : null));
  return (
    <Side
      name="examples"
      title="Examples"
      hint={examples[chosen] ? `${chosen} · ${examples[chosen].text}` : ""}
      narrow={narrow}
    >
      {examples.length === 0 && <p class="quiet">None yet.</p>}
      <ol ref={list}>
        {examples.map((each, i) => (
          <li key={i}>
            <Choice example={each} verdict={verdicts[i]} index={i} chosen={i === chosen} state={state} />
          </li>
        ))}
      </ol>
    </Side>
  );
}

/** Scrolls the side, and nothing around it, until the item is in it. */
function reveal(item: Element | undefined): void {
  const side = item?.closest(".side");
  if (!item || !side) return;
  const [box, at] = [side.getBoundingClientRect(), item.getBoundingClientRect()];
  if (at.top < box.top) side.scrollTop += at.top - box.top;
  else if (at.bottom > box.bottom) side.scrollTop += at.bottom - box.bottom;
}

function Choice(props: { example: Example; verdict: Verdict | null; index: number; chosen: boolean; state: State }) {
  const { example, verdict: said, index, chosen, state } = props;
  return (
    <button
      type="button"
      class="choice"
      data-example-index={index}
      aria-pressed={chosen}
      title={example.text}
      onClick={() => state.pick({ example: index })}
    >
      <span class="index number">{index}</span>
      <span class="text">{example.text}</span>
      {said && <Said verdict={said} />}
    </button>
  );
}

function Said({ verdict: { predicted, probability, label, right } }: { verdict: Verdict }) {
  return (
    <span class="verdict">
      {right !== null && (
        <span class={right ? "mark good" : "mark bad"} role="img" aria-label={right ? "right" : "wrong"}>
          {right ? "✓" : "✗"}
        </span>
      )}
      <span>
        {predicted} {probability !== null && <span class="number">{probability.toFixed(2)}</span>}
      </span>
      {right === false && <span class="quiet">is {label}</span>}
    </span>
  );
}
