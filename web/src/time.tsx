/** The bottom: when. Logged numbers, captures, and the slider over them. */
import { useSignal } from "@preact/signals";
import { useEffect, useLayoutEffect, useReducer, useRef } from "preact/hooks";
import { drawCurve, drawTicks, extent, type Frame, place, prepare } from "./draw.ts";
import type { State } from "./state.ts";
import { scalarText, whole } from "./words.ts";

/** Playing takes about this long, whatever the number of steps, within bounds for one step. */
const PLAY_MS = { whole: 12_000, least: 80, most: 500 };

/** Starts or stops playing. */
export function togglePlay(state: State): void {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const pause = Math.min(PLAY_MS.most, Math.max(PLAY_MS.least, PLAY_MS.whole / state.steps.value.length));
  state.play(!state.playing.value, still ? PLAY_MS.most : pause);
}

/** The bottom of the page. */
export function Time({ state }: { state: State }) {
  const scalar = useSignal("");
  const names = Object.keys(state.scalars.value);
  const shown = names.includes(scalar.value) ? scalar.value : names.includes("loss") ? "loss" : (names[0] ?? "");
  return (
    <footer class="time">
      <Named state={state} name={shown} names={names} onPick={(name) => (scalar.value = name)} />
      <Curve state={state} name={shown} />
      <Walk state={state} />
    </footer>
  );
}

function Named(props: { state: State; name: string; names: string[]; onPick: (name: string) => void }) {
  const { state, name, names, onPick } = props;
  const value = valueAt(state, name);
  return (
    <div class="named">
      {names.length > 1 ? (
        <select name="scalar" aria-label="logged number" value={name} onChange={(e) => onPick(e.currentTarget.value)}>
          {names.map((each) => (
            <option key={each}>{each}</option>
          ))}
        </select>
      ) : (
        <span class="quiet">{name || "nothing logged"}</span>
      )}
      <span class="number">{value === null ? "" : scalarText(value)}</span>
    </div>
  );
}

/** The last number logged at the shown step or before. */
function valueAt(state: State, name: string): number | null {
  const series = state.scalars.value[name];
  const step = state.step.value;
  if (!series || step === null) return null;
  return series.value[series.step.findLastIndex((each) => each <= step)] ?? null;
}

const TICKS = 7;

function Curve({ state, name }: { state: State; name: string }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const size = useSignal({ width: 0, height: 0 });
  const [, redraw] = useReducer((count: number) => count + 1, 0);
  const steps = state.steps.value;
  const step = state.step.value;
  const series = state.scalars.value[name] ?? { step: [], value: [] };
  const x = extent([...series.step, ...steps]) ?? [0, 1];
  const y = extent(series.value);
  const { width, height } = size.value;
  const frame: Frame = { width, height: height - TICKS - 5, x, y: y ?? [0, 1] };

  useEffect(() => {
    const watch = new ResizeObserver(([{ contentRect }]) => {
      size.value = { width: contentRect.width, height: contentRect.height };
    });
    if (canvas.current) watch.observe(canvas.current);
    return () => watch.disconnect();
  }, [size]);

  useLayoutEffect(() => {
    const pen = canvas.current && width ? prepare(canvas.current, width, height) : null;
    if (!pen || !canvas.current) return;
    const { color: ink, accentColor: accent } = getComputedStyle(canvas.current);
    pen.setTransform(...inset(canvas.current, width, height));
    drawCurve(pen, series.step, series.value, frame, ink);
    drawTicks(pen, steps, frame, height - TICKS, TICKS - 2, ink);
    if (step !== null) {
      pen.fillStyle = accent;
      pen.fillRect(place(step, x, width) - 0.75, -2, 1.5, height + 1);
    }
  });

  const edge = (index: 0 | 1) => (y && y[0] !== y[1] ? scalarText(y[index]) : "");
  return (
    <>
      <canvas
        class="curve"
        ref={canvas}
        role="img"
        aria-label={`${name || "nothing logged"} over steps ${whole(x[0])} to ${whole(x[1])}; ${whole(steps.length)} captures`}
        onTransitionEnd={() => redraw(undefined)}
        onClick={(event) => state.go(nearest(steps, event.offsetX / width, x))}
      />
      <span class="edges number" aria-hidden="true">
        <span>{edge(1)}</span>
        <span>{edge(0)}</span>
        <span class="captures">
          {steps.length > 0 && `${whole(steps.length)} ${steps.length === 1 ? "capture" : "captures"}`}
        </span>
      </span>
    </>
  );
}

/** Leaves a little air at the top, so that a peak is not cut in half. */
function inset(
  canvas: HTMLCanvasElement,
  width: number,
  height: number,
): [number, number, number, number, number, number] {
  return [canvas.width / width, 0, 0, canvas.height / height, 0, (2 * canvas.height) / height];
}

function nearest(steps: number[], part: number, [from, to]: [number, number]): number {
  const wanted = from + part * (to - from);
  let best = 0;
  for (let i = 1; i < steps.length; i++) if (Math.abs(steps[i] - wanted) < Math.abs(steps[best] - wanted)) best = i;
  return best;
}

function Walk({ state }: { state: State }) {
  const steps = state.steps.value;
  const index = Math.max(0, state.index.value);
  const last = Math.max(0, steps.length - 1);
  const step = state.step.value;
  const playing = state.playing.value;
  return (
    <>
      <div class="walk">
        <button
          type="button"
          class="icon"
          aria-label="previous step"
          aria-disabled={index <= 0}
          onClick={() => state.go(index - 1)}
        >
          <Icon path="M10 3 5 8l5 5" />
        </button>
        <button
          type="button"
          name="play"
          class="icon"
          aria-label={playing ? "pause" : "play"}
          onClick={() => togglePlay(state)}
        >
          <Icon path={playing ? "M5.5 3.5v9M10.5 3.5v9" : "M5 3v10l8-5z"} />
        </button>
        <button
          type="button"
          class="icon"
          aria-label="next step"
          aria-disabled={index >= last}
          onClick={() => state.go(index + 1)}
        >
          <Icon path="m6 3 5 5-5 5" />
        </button>
      </div>
      <input
        type="range"
        name="step"
        aria-label="step"
        aria-valuetext={step === null ? "no step yet" : `step ${step}`}
        min={0}
        max={last}
        value={index}
        onInput={(event) => state.go(event.currentTarget.valueAsNumber)}
      />
      <div class="at number">
        <span>{step === null ? "no step yet" : `step ${whole(step)}`}</span>
        <button
          type="button"
          name="follow"
          aria-pressed={state.following.value}
          onClick={() => state.follow(!state.following.value)}
        >
          follow
        </button>
      </div>
    </>
  );
}

function Icon({ path }: { path: string }) {
  return (
    <svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">
      <path d={path} />
    </svg>
  );
}
