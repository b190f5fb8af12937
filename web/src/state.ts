/** What is chosen and what has come: the signals that every view reads, and the moves that change them. */
import { batch, computed, effect, signal, untracked } from "@preact/signals";
import { assign, type Slots } from "./colour.ts";
import { type Focus, inside, type Lines, looksOf, questionOf, readLines, strokesOf, windowOf } from "./lines.ts";
import {
  type Change,
  type FirstLook,
  Gone,
  headsOf,
  type Life,
  type LinesQuestion,
  type News,
  Problem,
  type Reply,
  type Run,
  type Scalars,
  type Source,
  type StepFacts,
} from "./protocol.ts";
import { Newest, Replies } from "./replies.ts";

/** So long the first picture waits for the first look: where that is quick, nothing is drawn twice. */
const PATIENCE_MS = 150;

/** What a person may pick; `first` and `count` are as wished, whatever the example's length. */
export interface Picks {
  layer: number;
  heads: number[];
  example: number;
  first: number;
  count: number;
}

/** The state of one view. Ends with `signal`. */
export class State {
  readonly run = signal<Run | null>(null);
  readonly steps = signal<number[]>([]);
  readonly scalars = signal<Scalars>({});
  readonly life = signal<Life | null>(null);
  /** Seconds since the trainer was last heard of. */
  readonly age_s = signal(0);
  readonly gone = signal(false);
  readonly #wrong = signal<Partial<Record<"trial" | "lines" | "step", string>>>({});
  /** Why what was asked for is not there. */
  readonly problem = computed(() => Object.values(this.#wrong.value).find(Boolean) ?? "");
  /** What is wrong with the run. */
  readonly trouble = signal("");

  readonly picks = signal<Picks>({ layer: 0, heads: [0], example: 0, first: 0, count: 20 });
  /** The heads that the run has of the picked layer. */
  readonly heads = computed(() => headsOf(this.run.value?.layers[this.picks.value.layer]));
  /** How many tokens the picked example has. */
  readonly tokens = computed(() => this.run.value?.examples[this.picks.value.example]?.tokens.length ?? 0);
  /** The tokens to draw of it. */
  readonly window = computed(() => windowOf(this.picks.value, this.tokens.value));
  /** The colours of the heads in the picture. */
  readonly slots = signal<Slots>(new Map());
  readonly step = signal<number | null>(null);
  readonly following = signal(true);
  readonly playing = signal(false);

  readonly hover = signal<Focus | null>(null);
  readonly focus = signal<Focus | null>(null);
  readonly pin = signal<Focus | null>(null);
  /** The head whose tile is pointed at. */
  readonly strong = signal<number | null>(null);

  /** What is shown: the newest replies that came. */
  readonly lines = signal<Lines | null>(null);
  readonly facts = signal<StepFacts | null>(null);
  /** What was opened because it had changed most by then. */
  readonly opened = signal<(FirstLook & { step: number }) | null>(null);

  readonly index = computed(() => this.steps.value.indexOf(this.step.value ?? Number.NaN));
  /** The token that is looked at, of those in the picture. */
  readonly looked = computed(() => {
    const focus = this.hover.value ?? this.focus.value ?? this.pin.value;
    return this.lines.value && inside(focus, this.lines.value);
  });
  /** That token's weights. */
  readonly looks = computed(() => {
    const [lines, focus] = [this.lines.value, this.looked.value];
    return lines && focus ? looksOf(lines, focus) : [];
  });
  /** What is drawn. */
  readonly strokes = computed(() => {
    const lines = this.lines.value;
    return lines ? strokesOf(lines, this.looked.value) : { looks: [], share: 0 };
  });

  #source: Source;
  #signal: AbortSignal;
  #heard_ms = 0;
  #opening = false;
  #missed: Change[] = [];
  #touched = false;
  #first: "unseen" | "asked" | "seen" = "unseen";
  /** The newest step when a first look was last asked for. */
  #tried: number | null = null;
  #patience = 0;
  #settled = signal(false);
  /** Whether the run must be asked for anew. */
  #stale = true;
  #before: number[] = [0];
  #timer = 0;
  #replies!: Replies;
  #picture!: Newest<LinesQuestion>;
  #check!: Newest<{ ask: "step"; step: number }>;

  constructor(source: Source, signal: AbortSignal) {
    this.#source = source;
    this.#signal = signal;
    this.#clear();
    const stop = [effect(() => this.#askLines()), effect(() => this.#askStep())];
    const clock = setInterval(() => this.#tick(), 1000);
    signal.addEventListener("abort", () => {
      clearInterval(clock);
      clearTimeout(this.#timer);
      clearTimeout(this.#patience);
      for (const each of stop) each();
    });
    source.onTrial((news) => this.#hear(news), signal);
    void this.#open(null);
  }

  /** Changes what is picked; from here on the first look moves nothing. */
  pick(change: Partial<Picks>): void {
    this.#touched = true;
    batch(() => {
      this.#choose(change);
      this.#settled.value = true;
    });
  }

  /** Shows one head alone, or with `more` adds it to or takes it from those shown. */
  pickHead(head: number, more: boolean): void {
    const { heads } = this.picks.value;
    const others = heads.filter((each) => each !== head);
    const added = others.length < heads.length ? others : [...heads, head];
    if (!more) this.pick({ heads: [head] });
    else if (added.length) this.pick({ heads: added.sort((a, b) => a - b) });
  }

  /** Shows all heads, or those that were shown before. */
  toggleAll(): void {
    const { heads } = this.picks.value;
    const all = this.heads.value;
    if (heads.length < all.length) {
      this.#before = heads;
      this.pick({ heads: all });
    } else this.pick({ heads: this.#before.length < all.length ? this.#before : all.slice(0, 1) });
  }

  /** Moves to another head or layer, around the end. */
  turn(what: "head" | "layer", by: number): void {
    if (what === "layer") {
      const count = this.run.value?.layers.length ?? 0;
      if (count) this.pick({ layer: (this.picks.value.layer + by + count) % count });
      return;
    }
    const all = this.heads.value;
    const next = all[(all.indexOf(this.picks.value.heads[0]) + by + all.length) % all.length];
    if (next !== undefined) this.pick({ heads: [next] });
  }

  /** Goes to the step at `index` of the list and lets go of the newest. */
  go(index: number): void {
    this.playing.value = false;
    this.#go(index);
  }

  /** Goes to the newest step and stays with it, or lets go. */
  follow(on: boolean): void {
    batch(() => {
      this.following.value = on;
      if (!on) return;
      this.playing.value = false;
      this.step.value = this.steps.value.at(-1) ?? null;
    });
  }

  /** Walks through the steps, from the first if it stands at the last; or stops. */
  play(on: boolean, pause_ms: number): void {
    clearTimeout(this.#timer);
    const last = this.steps.value.length - 1;
    this.playing.value = on && last > 0;
    if (!this.playing.value) return;
    if (this.index.value === last) this.#go(0);
    this.#timer = setTimeout(() => this.#advance(pause_ms), pause_ms);
  }

  /** Holds a token, or lets it go if it is held. */
  hold(token: Focus): void {
    const held = this.pin.value;
    this.#touched = true;
    this.pin.value = held?.side === token.side && held.token === token.token ? null : token;
  }

  /** Lets go of every token. */
  release(): void {
    batch(() => {
      this.pin.value = null;
      this.focus.value = null;
      this.hover.value = null;
    });
  }

  #choose(change: Partial<Picks>): void {
    batch(() => {
      this.picks.value = fitted({ ...this.picks.value, ...change }, this.run.value);
      this.strong.value = null;
    });
  }

  #go(index: number): void {
    const steps = this.steps.value;
    batch(() => {
      this.following.value = false;
      this.step.value = steps[Math.max(0, Math.min(steps.length - 1, index))] ?? null;
    });
  }

  #advance(pause_ms: number): void {
    if (!this.playing.value) return;
    const arrived = this.lines.value?.question.step === this.step.value || this.problem.value !== "";
    if (arrived && this.index.value >= this.steps.value.length - 1) {
      this.playing.value = false;
      return;
    }
    if (arrived) this.#go(this.index.value + 1);
    this.#timer = setTimeout(() => this.#advance(pause_ms), pause_ms);
  }

  #clear(): void {
    this.#picture?.forget();
    this.#check?.forget();
    this.#replies = new Replies(this.#source);
    this.#picture = new Newest(
      this.#replies,
      (question, reply) => this.#show(question, reply),
      (error) => this.#fail("lines", error),
    );
    this.#check = new Newest(
      this.#replies,
      (_, { facts }) => {
        this.facts.value = facts as StepFacts;
        this.#say("step", "");
      },
      (error) => this.#fail("step", error),
    );
  }

  /** Lets go of all that is known of the run, save its name. */
  #forget({ run, attempt, state }: Change): void {
    clearTimeout(this.#timer);
    clearTimeout(this.#patience);
    this.#first = "unseen";
    this.#tried = null;
    batch(() => {
      this.#clear();
      const old = this.run.value;
      const none = { run, attempt, state, steps: [], layers: [], examples: [], scalars: {} };
      this.run.value = old && { ...old, ...none };
      this.steps.value = [];
      this.step.value = null;
      this.scalars.value = {};
      this.lines.value = null;
      this.facts.value = null;
      this.opened.value = null;
      this.slots.value = new Map();
      this.#wrong.value = {};
      this.#settled.value = false;
      this.following.value = true;
      this.playing.value = false;
      this.release();
    });
  }

  #askLines(): void {
    const run = this.run.value;
    const step = this.step.value;
    const picks = this.picks.value;
    const [layer, example] = [run?.layers[picks.layer], run?.examples[picks.example]];
    if (!this.#settled.value || step === null || !layer || !example) return;
    // A reply at hand is shown within this very call.
    untracked(() => this.#picture.ask(questionOf(layer, example, { ...picks, step })));
  }

  #askStep(): void {
    const step = this.run.value && this.step.value;
    if (step !== null) untracked(() => this.#check.ask({ ask: "step", step }));
  }

  #show(question: LinesQuestion, reply: Reply): void {
    batch(() => {
      this.lines.value = readLines(question, reply);
      this.slots.value = assign(this.slots.value, question.heads);
      this.#say("lines", "");
    });
  }

  #say(about: "trial" | "lines" | "step", message: string): void {
    if ((this.#wrong.value[about] ?? "") !== message) this.#wrong.value = { ...this.#wrong.value, [about]: message };
  }

  #fail(about: "trial" | "lines" | "step", error: unknown): void {
    if (error instanceof Gone) this.gone.value = true;
    else this.#say(about, error instanceof Error ? error.message : String(error));
  }

  /** Asks for the run, because of `change` if there is one. */
  async #open(change: Change | null): Promise<void> {
    if (this.#opening) return;
    this.#opening = true;
    this.#stale = true;
    try {
      const { facts } = await this.#source.ask({ ask: "trial" });
      this.#begin(facts as Run);
    } catch (error) {
      batch(() => {
        if (change && this.#replacedBy(change)) this.#forget(change);
        if (change) this.#hearLife(change.state);
        this.#fail("trial", error);
      });
    }
    this.#opening = false;
    for (const missed of this.#missed.splice(0)) this.#learn(missed);
  }

  #begin(run: Run): void {
    batch(() => {
      if (this.#replacedBy(run)) this.#forget(run);
      this.#stale = false;
      this.#say("trial", "");
      this.run.value = run;
      this.steps.value = run.steps;
      const step = this.step.value;
      if (step !== null && !run.steps.includes(step))
        this.step.value = run.steps.findLast((have) => have < step) ?? run.steps[0] ?? null;
      this.#choose({});
      this.#merge(run);
    });
  }

  #replacedBy(now: Change): boolean {
    const run = this.run.value;
    return run !== null && replaced(run, this.steps.value, now);
  }

  #hear(news: News): void {
    if (this.#signal.aborted) return;
    if (news instanceof Gone) this.gone.value = true;
    else if (news instanceof Problem) this.trouble.value = news.message;
    else this.#learn(news);
  }

  #learn(change: Change): void {
    const run = this.run.value;
    const again = this.gone.value || this.problem.value !== "";
    this.gone.value = false;
    this.trouble.value = "";
    if (this.#opening) {
      this.#missed.push(change);
      return;
    }
    const other = this.#replacedBy(change);
    if (other && change.state.state === "waiting") {
      this.#forget(change);
      this.#hearLife(change.state);
    }
    // Before the first file is there, a run has no layers to speak of.
    const grown = change.steps.length > 0 && !run?.layers.length;
    if (this.#stale || other || grown || run?.state.thinned !== change.state.thinned) void this.#open(change);
    else {
      const step = this.step.value;
      this.#merge(change);
      if (again && step === this.step.value) this.#askAgain();
    }
  }

  #askAgain(): void {
    this.#askLines();
    this.#askStep();
  }

  #merge(change: Change): void {
    batch(() => {
      this.#hearLife(change.state);
      if (change.steps.length) this.steps.value = union(this.steps.value, change.steps);
      this.scalars.value = append(this.scalars.value, change.scalars);
      if (this.following.value || this.step.value === null) this.step.value = this.steps.value.at(-1) ?? null;
    });
    void this.#look();
  }

  #hearLife(life: Life): void {
    this.life.value = life;
    this.#heard_ms = performance.now();
    this.#tick();
  }

  /** Opens what changed most, once, as soon as there are two steps and if nothing was picked until then. */
  async #look(): Promise<void> {
    const newest = this.steps.value.at(-1);
    if (newest === undefined || this.#first === "asked") return;
    if (this.#first === "seen" || this.steps.value.length < 2 || this.#touched || newest === this.#tried) {
      this.#settled.value = true;
      return;
    }
    this.#first = "asked";
    this.#tried = newest;
    this.#patience = setTimeout(() => (this.#settled.value = true), PATIENCE_MS);
    const replies = this.#replies;
    const reply = await replies.ask({ ask: "first_look", step: newest }).catch(() => null);
    if (replies !== this.#replies) return;
    clearTimeout(this.#patience);
    this.#first = reply ? "seen" : "unseen";
    batch(() => {
      if (reply && !this.#touched) {
        const look = reply.facts as FirstLook;
        this.opened.value = { ...look, step: newest };
        this.#choose({ layer: look.layer, heads: [look.head], example: look.example });
      }
      this.#settled.value = true;
    });
  }

  #tick(): void {
    const life = this.life.value;
    if (life) this.age_s.value = (life.age_s ?? 0) + Math.floor((performance.now() - this.#heard_ms) / 1000);
  }
}

/** Whether `now` speaks of another run than the one shown, or of one that is gone. */
export function replaced(shown: Run, steps: readonly number[], now: Change): boolean {
  const another = (shown.run ?? now.run) !== (now.run ?? shown.run) || shown.attempt !== now.attempt;
  return another || (now.state.state === "waiting" && steps.length > 0);
}

/** The picks moved to what the run has; as they are while it has nothing. */
export function fitted(picks: Picks, run: Run | null): Picks {
  const layer = within(picks.layer, run?.layers);
  const all = headsOf(run?.layers[layer]);
  const kept = picks.heads.filter((head) => all.includes(head));
  const heads = kept.length ? kept : all.slice(0, 1);
  return { ...picks, layer, heads: all.length ? heads : picks.heads, example: within(picks.example, run?.examples) };
}

function within(index: number, list: readonly unknown[] = []): number {
  return list.length ? Math.min(index, list.length - 1) : index;
}

/** All of two rising lists, rising, each once. */
export function union(old: number[], more: number[]): number[] {
  if (!old.length || more[0] > (old.at(-1) as number)) return [...old, ...more];
  return [...new Set([...old, ...more])].sort((a, b) => a - b);
}

/** What was logged, with the rows that are newer put behind. */
export function append(old: Scalars, more: Scalars): Scalars {
  const all = { ...old };
  for (const [name, { step, value }] of Object.entries(more)) {
    const had = old[name] ?? { step: [], value: [] };
    const last = had.step.at(-1) ?? Number.NEGATIVE_INFINITY;
    const from = step.findIndex((each) => each > last);
    if (from < 0) continue;
    all[name] = { step: [...had.step, ...step.slice(from)], value: [...had.value, ...value.slice(from)] };
  }
  return all;
}
