/** The line at the top: which run, how it is, whether to believe it. */
import type { State } from "./state.ts";
import { lifeText, stepCheckText } from "./words.ts";

/** The top line. */
export function Header({ state, onHelp }: { state: State; onHelp: () => void }) {
  const run = state.run.value;
  const facts = state.facts.value;
  return (
    <header class="header">
      <h1 title={run?.name}>{run?.name ?? "Headscope"}</h1>
      <Life state={state} />
      <span
        class={facts?.failed.length ? "check bad" : "check"}
        title="largest error of the weights rebuilt from q and k"
      >
        {facts && stepCheckText(facts)}
      </span>
      <button type="button" name="help" class="icon" aria-label="Keys" onClick={onHelp}>
        ?
      </button>
    </header>
  );
}

function Life({ state }: { state: State }) {
  const life = state.life.value;
  const run = state.run.value;
  if (state.gone.value) return <Sentence kind="gone" text="The server does not answer; trying again." />;
  if (!life || !run) return <Sentence kind="waiting" text="Opening the run." />;
  const kind = life.state === "training" && !life.alive ? "lost" : life.state;
  return <Sentence kind={kind} text={lifeText(life, run.name, state.age_s.value)} />;
}

function Sentence({ kind, text }: { kind: string; text: string }) {
  return (
    <p class="state" data-state={kind} title={text}>
      {text}
    </p>
  );
}
