/** The centre: tokens on both sides, lines between. */
import { useSignal } from "@preact/signals";
import { useEffect, useLayoutEffect, useReducer, useRef } from "preact/hooks";
import { bars, headColour, thinning } from "./colour.ts";
import { drawLines, prepare } from "./draw.ts";
import { type Focus, type Lines, type Look, withheld } from "./lines.ts";
import type { Example } from "./protocol.ts";
import type { State } from "./state.ts";
import { Weight } from "./weight.tsx";
import { headsText, moreText, nothingText, splitToken, withheldText } from "./words.ts";

const ROW = { least: 16, most: 30 };
/** The headings' height and a little air. */
const HEADING = 28;
/** The height of the line that says which tokens are not drawn. */
const MORE = 32;

/** The attention-head view. */
export function Picture({ state }: { state: State }) {
  const lines = state.lines.value;
  const example = lines && state.run.value?.examples[lines.question.example];
  if (!lines || !example) return <Empty text={emptyText(state)} />;
  if (withheld(lines)) return <Empty text={withheldText(lines.question.layer, lines)} lines={lines} />;
  return <Drawn state={state} lines={lines} example={example} />;
}

function emptyText(state: State): string {
  const { value: run } = state.run;
  const life = state.life.value;
  if (state.problem.value) return "There is no picture to show.";
  if (!run || !life) return "Opening the run.";
  if (state.steps.value.length && run.layers.length && run.examples.length) return "Reading the weights.";
  return nothingText(run.name, life, state.steps.value.length);
}

function Empty({ text, lines }: { text: string; lines?: Lines }) {
  const holder = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    if (holder.current && lines) mark(holder.current, lines);
  }, [lines]);
  return (
    <div class="picture empty" ref={holder}>
      <p>{text}</p>
    </div>
  );
}

/** Says on the element what it shows and since when. */
function mark(holder: HTMLElement, { question }: Lines): void {
  holder.dataset.step = String(question.step);
  holder.dataset.layer = String(question.layer);
  holder.dataset.heads = question.heads.join(",");
  holder.dataset.example = String(question.example);
  holder.dataset.drawnAt = String(performance.timeOrigin + performance.now());
}

function Drawn({ state, lines, example }: { state: State; lines: Lines; example: Example }) {
  const holder = useRef<HTMLDivElement>(null);
  const canvas = useRef<HTMLCanvasElement>(null);
  const room = useSignal({ height: 0, width: 0 });
  const [, redraw] = useReducer((count: number) => count + 1, 0);
  const { shown_first: first, shown_count: count, question } = lines;
  const focus = state.looked.value;
  const looks = state.looks.value;
  const strokes = state.strokes.value.looks;
  const slots = state.slots.value;
  const strong = question.heads.indexOf(state.strong.value ?? -1);
  const air = HEADING + (count < example.tokens.length ? MORE : 0);
  const row = Math.max(ROW.least, Math.min(ROW.most, Math.floor((room.value.height - air) / count)));

  useEffect(() => {
    const watch = new ResizeObserver(() => {
      const [box, drawing] = [holder.current, canvas.current];
      if (box && drawing) room.value = { height: box.clientHeight, width: drawing.clientWidth };
    });
    if (holder.current) watch.observe(holder.current);
    if (canvas.current) watch.observe(canvas.current);
    return () => watch.disconnect();
  }, [room]);

  useLayoutEffect(() => {
    const drawing = canvas.current;
    if (!drawing || !holder.current || !room.value.width) return;
    const rows = { width: room.value.width, height: row, first };
    const pen = prepare(drawing, rows.width, row * count);
    const ink = getComputedStyle(drawing).color;
    const colours = question.heads.map((head) => headColour(slots, head, ink));
    const manner = {
      colours,
      spread: slots.size ? Math.min(4, (row * 0.6) / slots.size) : 0,
      strong: strong < 0 || colours.length < 2 ? null : strong,
      thin: thinning(strong < 0 && !slots.size ? question.heads.length : 1, count),
    };
    if (pen) drawLines(pen, strokes, rows, manner);
    mark(holder.current, lines);
  });

  const column = { state, lines, example, focus, looks };
  const what = `layer ${question.layer}, ${headsText(question.heads)}, step ${question.step}`;
  return (
    <div class="picture" ref={holder} style={{ "--row": `${row}px` }} data-small={row < 19}>
      <span class="heading" data-of="query">
        queries
      </span>
      <span class="heading">look at</span>
      <span class="heading">keys</span>
      <Column {...column} side="query" />
      <canvas
        class="lines"
        ref={canvas}
        role="img"
        aria-label={`Attention of ${what}: lines from query tokens on the left to key tokens on the right`}
        style={{ height: `${row * count}px` }}
        // The ink changes when the page turns dark or light, whoever turned it; its transition ends then.
        onTransitionEnd={() => redraw(undefined)}
      />
      <Column {...column} side="key" />
      <More state={state} lines={lines} tokens={example.tokens.length} />
    </div>
  );
}

/** Beyond this many, the tokens that are not drawn are shown a window at a time. */
const MOST_AT_ONCE = 64;

function More({ state, lines, tokens }: { state: State; lines: Lines; tokens: number }) {
  const { shown_first: first, shown_count: count } = lines;
  const said = moreText(first, tokens - first - count);
  if (!said) return null;
  const show = (from: number) => state.pick({ first: Math.max(0, Math.min(from, tokens - 1)) });
  return (
    <p class="more">
      <span>{said}</span>
      {tokens <= MOST_AT_ONCE ? (
        <button type="button" name="more" onClick={() => state.pick({ first: 0, count: tokens })}>
          show all
        </button>
      ) : (
        <>
          {first > 0 && (
            <button type="button" name="before" onClick={() => show(first - state.picks.value.count)}>
              show those before
            </button>
          )}
          {first + count < tokens && (
            <button type="button" name="more" onClick={() => show(first + count)}>
              show the next
            </button>
          )}
        </>
      )}
    </p>
  );
}

interface ColumnProps {
  state: State;
  lines: Lines;
  example: Example;
  focus: Focus | null;
  looks: Look[];
  side: Focus["side"];
}

function Column({ state, lines, example, focus, looks, side }: ColumnProps) {
  const { shown_first: first, shown_count: count, question } = lines;
  const here = focus?.side === side ? focus.token : null;
  const seen = focus && here === null ? byToken(looks, side) : null;
  const pin = state.pin.value;
  const tokenOf = (event: Event) => {
    const row = (event.target as Element).closest<HTMLElement>("[data-token]");
    return row ? { side, token: Number(row.dataset.token) } : null;
  };
  return (
    <div
      class="column"
      data-side={side}
      role="listbox"
      aria-label={side === "query" ? "query tokens" : "key tokens"}
      onPointerOver={(event) => (state.hover.value = tokenOf(event))}
      onPointerLeave={() => (state.hover.value = null)}
      onClick={(event) => {
        const token = tokenOf(event);
        if (token) state.hold(token);
      }}
      onFocusIn={(event) => {
        if ((event.target as Element).matches(":focus-visible")) state.focus.value = tokenOf(event);
      }}
      onFocusOut={() => (state.focus.value = null)}
      onKeyDown={(event) => {
        const token = event.key === "Enter" ? tokenOf(event) : null;
        if (token) state.hold(token);
      }}
    >
      {Array.from({ length: count }, (_, i) => {
        const token = first + i;
        return (
          <Token
            key={token}
            token={token}
            text={example.tokens[token]}
            special={example.special[token] ?? false}
            here={here === token}
            pinned={pin?.side === side && pin.token === token}
            entry={token === (here ?? first)}
            looks={seen?.get(token) ?? null}
            heads={question.heads}
            side={side}
            state={state}
          />
        );
      })}
    </div>
  );
}

/** Each token's weights in the order of the heads. */
function byToken(looks: Look[], side: Focus["side"]): Map<number, Look[]> {
  const found = new Map<number, Look[]>();
  for (const look of looks) found.set(look[side], [...(found.get(look[side]) ?? []), look]);
  return found;
}

interface TokenProps {
  token: number;
  text: string;
  special: boolean;
  here: boolean;
  pinned: boolean;
  entry: boolean;
  looks: Look[] | null;
  heads: number[];
  side: Focus["side"];
  state: State;
}

function Token({ token, text, special, here, pinned, entry, looks, heads, side, state }: TokenProps) {
  const { mark: sign, text: rest } = splitToken(text);
  const colour = (slot: number) => headColour(state.slots.value, heads[slot], "var(--ink)");
  const byHead = (looks ?? []).toSorted((a, b) => a.slot - b.slot);
  const shares = byHead.map(({ slot, weight }) => ({ weight, colour: colour(slot) }));
  return (
    <div
      class={special ? "token special" : "token"}
      data-token={token}
      role="option"
      aria-selected={here || pinned}
      tabIndex={entry ? 0 : -1}
      title={text}
    >
      <span class="word" style={looks ? { background: bars(shares, side === "query" ? "right" : "left") } : {}}>
        {sign && <span class="sign">{sign}</span>}
        {rest || (!sign && <span class="sign">␣</span>)}
      </span>
      {looks?.[0] && <Weight look={looks[0]} heads={heads} colour={heads.length > 1 ? colour(looks[0].slot) : null} />}
    </div>
  );
}
