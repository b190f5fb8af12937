/** Above the picture: which layer, which heads, which tokens. */
import { headColour } from "./colour.ts";
import type { State } from "./state.ts";

/** Beyond this many, lines between tokens say nothing. */
const MOST_TOKENS = 512;

/** The pickers of the attention-head view. */
export function Pickers({ state }: { state: State }) {
  return (
    <div class="pickers">
      <LayerPicker state={state} />
      <TokenPicker state={state} />
      <HeadPicker state={state} />
    </div>
  );
}

function LayerPicker({ state }: { state: State }) {
  const failed = state.facts.value?.failed ?? [];
  return (
    <label class="layer">
      layer{" "}
      <select
        name="layer"
        value={state.picks.value.layer}
        onChange={(event) => state.pick({ layer: Number(event.currentTarget.value) })}
      >
        {state.run.value?.layers.map(({ path, call }, i) => (
          <option key={`${path}@${call}`} value={i}>
            {i} · {path}
            {call > 0 && `@${call}`}
            {failed.includes(i) && " ✗ self-check"}
          </option>
        ))}
      </select>
    </label>
  );
}

function TokenPicker({ state }: { state: State }) {
  const most = state.tokens.value;
  const { first, count } = state.window.value;
  return (
    <div class="tokens">
      <Field label="first token" name="first" value={first} most={most - 1} bounds={[0, most - 1]} state={state} />
      <Field label="tokens" name="count" value={count} most={most - first} bounds={[1, MOST_TOKENS]} state={state} />
      <span>of {most}</span>
    </div>
  );
}

interface FieldProps {
  label: string;
  name: "first" | "count";
  value: number;
  /** The most there is to show. */
  most: number;
  /** What may be wished for. */
  bounds: [number, number];
  state: State;
}

function Field({ label, name, value, most, bounds: [least, beyond], state }: FieldProps) {
  return (
    <label>
      {label}{" "}
      <input
        type="number"
        name={name}
        value={value}
        min={least}
        max={most}
        onChange={(event) => {
          const asked = event.currentTarget.valueAsNumber;
          if (Number.isFinite(asked)) state.pick({ [name]: Math.round(Math.min(beyond, Math.max(least, asked))) });
          event.currentTarget.value = String(state.window.value[name]);
        }}
      />
    </label>
  );
}

function HeadPicker({ state }: { state: State }) {
  const all = state.heads.value;
  const { heads } = state.picks.value;
  const slots = state.slots.value;
  return (
    // biome-ignore lint/a11y/useSemanticElements: a fieldset cannot be laid out as a line of tiles everywhere
    <div class="heads" role="group" aria-label="heads">
      <span aria-hidden="true">{all.length === 1 ? "head" : "heads"}</span>
      {all.map((head) => (
        <button
          type="button"
          key={head}
          class="tile"
          data-head={head}
          aria-pressed={heads.includes(head)}
          aria-label={`head ${head}`}
          style={slots.has(head) ? { "--mark": headColour(slots, head, "var(--ink)") } : {}}
          onClick={(event) => state.pickHead(head, event.shiftKey || event.ctrlKey || event.metaKey)}
          onPointerEnter={() => (state.strong.value = head)}
          onPointerLeave={() => (state.strong.value = null)}
        >
          {head}
        </button>
      ))}
      {all.length > 1 && (
        <button
          type="button"
          name="all"
          class="tile all"
          aria-pressed={heads.length === all.length}
          onClick={() => state.toggleAll()}
        >
          all
        </button>
      )}
    </div>
  );
}
