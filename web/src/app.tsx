/** The whole view: its four places, and the keys. */
import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { Examples } from "./examples.tsx";
import { Header } from "./header.tsx";
import { Help } from "./help.tsx";
import { type Deed, deed } from "./keys.ts";
import { neighbour } from "./lines.ts";
import { Numbers } from "./numbers.tsx";
import { Pickers } from "./pickers.tsx";
import { Picture } from "./picture.tsx";
import { Spoken } from "./spoken.tsx";
import type { State } from "./state.ts";
import { Time, togglePlay } from "./time.tsx";

/** Below this width the sides fold. */
const WIDE = 900;

/** The view of one run. */
export function App({ state }: { state: State }) {
  const app = useRef<HTMLDivElement>(null);
  const help = useRef<HTMLDialogElement>(null);
  const narrow = useSignal(innerWidth < WIDE);

  useEffect(() => {
    const watch = new ResizeObserver(([{ contentRect }]) => (narrow.value = contentRect.width < WIDE));
    if (app.current) watch.observe(app.current);
    // Keys work from the start where the page has nothing else to focus.
    if (document.activeElement === document.body) app.current?.focus({ preventScroll: true });
    return () => watch.disconnect();
  }, [narrow]);

  const onKeyDown = (event: KeyboardEvent) => {
    if (help.current?.open) return;
    const found = deed(event, controlOf(event.target as Element));
    if (!found) return;
    event.preventDefault();
    if (found === "help") help.current?.showModal();
    else act(found, event.key, state, app.current as HTMLElement);
  };

  return (
    // biome-ignore lint/a11y/noStaticElementInteractions: keys that work wherever the focus is, each with a control of its own
    <div
      class={narrow.value ? "app narrow" : "app"}
      ref={app}
      tabIndex={-1}
      onKeyDown={onKeyDown}
      onClickCapture={(event) => letGo(event, app.current as HTMLElement)}
    >
      <Header state={state} onHelp={() => help.current?.showModal()} />
      <div class="body">
        <Examples state={state} narrow={narrow.value} />
        <section class="centre" aria-label="Attention heads">
          {state.heads.value.length > 0 && <Pickers state={state} />}
          <div role="alert" class="problem">
            {state.problem.value || state.trouble.value}
          </div>
          <Spoken state={state} />
          <Picture state={state} />
        </section>
        <Numbers state={state} narrow={narrow.value} />
      </div>
      <Time state={state} />
      <Help dialog={help} />
    </div>
  );
}

/** After a click of the mouse on a button the keys are the view's again: Space plays. */
function letGo(event: MouseEvent, app: HTMLElement): void {
  if (event.detail > 0 && (event.target as Element).closest("button, summary")) app.focus({ preventScroll: true });
}

function controlOf(target: Element): string {
  const name = target.localName;
  return name === "input" ? `input:${(target as HTMLInputElement).type}` : name;
}

function act(what: Deed, key: string, state: State, app: HTMLElement): void {
  const deeds: Record<Exclude<Deed, "help">, () => void> = {
    token: () => moveFocus(state, key, app),
    "head-": () => state.turn("head", -1),
    "head+": () => state.turn("head", 1),
    "layer-": () => state.turn("layer", -1),
    "layer+": () => state.turn("layer", 1),
    "step-": () => state.go(state.index.value - 1),
    "step+": () => state.go(state.index.value + 1),
    play: () => togglePlay(state),
    follow: () => state.follow(true),
    all: () => state.toggleAll(),
    clear: () => {
      state.release();
      app.focus();
    },
  };
  if (what !== "help") deeds[what]();
}

function moveFocus(state: State, key: string, app: HTMLElement): void {
  const lines = state.lines.value;
  const to = lines && neighbour(lines, state.looked.value, key);
  if (!to) return;
  state.hover.value = null;
  app.querySelector<HTMLElement>(`[data-side=${to.side}] [data-token="${to.token}"]`)?.focus();
}
