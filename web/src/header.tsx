/** The line at the top: which run, how it is, whether to believe it. */
import { useSignal } from "@preact/signals";
import type { State } from "./state.ts";
import { lifeNote, lifeText, stepCheckText } from "./words.ts";

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
  const note = life ? lifeNote(life) : "";
  if (state.gone.value) return <Said kind="gone" text="The server does not answer; trying again." note={note} />;
  if (!life || !run) return <Said kind="waiting" text="Opening the run." note="" />;
  const kind = life.state === "training" && !life.alive ? "lost" : life.state;
  return <Said kind={kind} text={lifeText(life, run.name, state.age_s.value)} note={note} long={life.message !== ""} />;
}

/** A sentence and what the trainer noted; where that may be too long for its place, a press shows all of it. */
function Said({ kind, text, note, long = false }: { kind: string; text: string; note: string; long?: boolean }) {
  const open = useSignal(false);
  const said = (
    <>
      <span class="sentence">{text}</span>
      {note && <span class="note">{note}</span>}
    </>
  );
  const title = note ? `${text}\n${note}` : text;
  if (!long)
    return (
      <p class="state" data-state={kind} title={title}>
        {said}
      </p>
    );
  return (
    <button
      type="button"
      name="message"
      class="state"
      data-state={kind}
      title={title}
      aria-expanded={open.value}
      onClick={() => (open.value = !open.value)}
    >
      {said}
    </button>
  );
}
