/** The right side: what the numbers are. */
import { headColour, opacity, thickness, thinning } from "./colour.ts";
import { type Focus, LEAST, type Lines, type Look, MOST, withheld } from "./lines.ts";
import type { Example, Layer } from "./protocol.ts";
import { Side } from "./side.tsx";
import type { State } from "./state.ts";
import { Weight } from "./weight.tsx";
import { checkText, errorText, headsText, maskText, percent, whole } from "./words.ts";

const SAMPLES = [0.01, 0.05, 0.2, 0.5, 1];
const MOST_ROWS = 64;

/** The focused token's weights, what is shown of the mass, the scale, and where the numbers come from. */
export function Numbers({ state, narrow }: { state: State; narrow: boolean }) {
  const lines = state.lines.value;
  const run = state.run.value;
  const layer = lines && run?.layers[lines.question.layer];
  const example = lines && run?.examples[lines.question.example];
  const { title, focus } = focused(state);
  return (
    <Side name="numbers" title={title} hint={lines ? where(lines) : ""} narrow={narrow}>
      {lines && layer && example ? (
        <>
          {!withheld(lines) && <Mass state={state} focus={focus} />}
          {!withheld(lines) && focus && <Looks state={state} lines={lines} example={example} focus={focus} />}
          {!withheld(lines) && <Scale state={state} lines={lines} />}
          <Origin lines={lines} layer={layer} />
        </>
      ) : (
        <p class="quiet">No weights yet.</p>
      )}
    </Side>
  );
}

function where({ question }: Lines): string {
  return `layer ${question.layer} · ${headsText(question.heads)} · step ${whole(question.step)}`;
}

function focused(state: State): { title: string; focus: Focus | null } {
  const [lines, focus] = [state.lines.value, state.looked.value];
  const tokens = lines && state.run.value?.examples[lines.question.example]?.tokens;
  return { title: focus && tokens ? `“${tokens[focus.token]}” as ${focus.side}` : "Weights", focus };
}

function Mass({ state, focus }: { state: State; focus: Focus | null }) {
  const { looks, share } = state.strokes.value;
  const drawn = `${whole(looks.length)} ${looks.length === 1 ? "line" : "lines"}`;
  const least = looks.length === MOST ? looks[0].weight : LEAST;
  return (
    <p class="mass">
      {focus?.side === "key" ? (
        <>{drawn} lead here</>
      ) : (
        <>
          shows <strong class="number">{percent(share)}</strong> of the mass: {drawn}
        </>
      )}
      <span class="quiet"> of weight {errorText(least)} or more</span>
    </p>
  );
}

function Looks({ state, lines, example, focus }: { state: State; lines: Lines; example: Example; focus: Focus }) {
  const looks = state.looks.value;
  const other = focus.side === "query" ? "key" : "query";
  const { heads } = lines.question;
  const slots = state.slots.value;
  return (
    <>
      <ol class="looks" aria-label={focus.side === "query" ? "looks at" : "is looked at by"}>
        {looks.slice(0, MOST_ROWS).map((look: Look) => (
          <li key={`${look.slot} ${look[other]}`}>
            <span class="quiet" aria-hidden="true">
              {focus.side === "query" ? "→" : "←"}
            </span>
            <span class="text">{example.tokens[look[other]]}</span>
            <Weight
              look={look}
              heads={heads}
              colour={heads.length > 1 ? headColour(slots, heads[look.slot], "var(--ink)") : null}
            />
          </li>
        ))}
      </ol>
      {looks.length > MOST_ROWS && (
        <p class="quiet">
          the {MOST_ROWS} heaviest of {whole(looks.length)}
        </p>
      )}
    </>
  );
}

function Scale({ state, lines }: { state: State; lines: Lines }) {
  const { heads } = lines.question;
  const slots = state.slots.value;
  const thin = thinning(slots.size ? 1 : heads.length, lines.shown_count);
  return (
    <figure class="scale">
      <figcaption>weight</figcaption>
      <ul>
        {SAMPLES.map((weight) => (
          <li key={weight}>
            <span class="stroke">
              <span style={{ height: `${thickness(weight, thin)}px`, opacity: opacity(weight, thin) }} />
            </span>
            <span class="number">{weight}</span>
          </li>
        ))}
      </ul>
      {slots.size > 0 && (
        <ul class="legend" aria-label="colours of the heads">
          {heads.map((head) => (
            <li key={head} style={{ "--mark": headColour(slots, head, "var(--ink)") }}>
              {head}
            </li>
          ))}
        </ul>
      )}
      {heads.length > 1 && slots.size === 0 && (
        <p class="quiet">{heads.length} heads lie over each other. Point at a head's tile to see it alone.</p>
      )}
    </figure>
  );
}

function Origin({ lines, layer }: { lines: Lines; layer: Layer }) {
  const rows: [string, string][] = [
    ["step", whole(lines.question.step)],
    ["layer", `${layer.path}${layer.call ? `@${layer.call}` : ""}`],
    ["heads", layer.kv_heads === layer.heads ? `${layer.heads}` : `${layer.heads} on ${layer.kv_heads} key heads`],
    ["route", lines.route],
    ["dtype", lines.dtype],
    ["mask", maskText(lines.mask)],
    ...(lines.scale === null ? [] : ([["scale", String(Number(lines.scale.toPrecision(4)))]] as [string, string][])),
    ["self-check", checkText(lines.check)],
  ];
  return (
    <dl class="origin">
      {rows.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{breakable(value)}</dd>
        </div>
      ))}
    </dl>
  );
}

/** Lets a dotted path break after its dots. */
function breakable(path: string) {
  return path.split(/(?<=[.:])/).flatMap((part) => [part, <wbr key={part} />]);
}
