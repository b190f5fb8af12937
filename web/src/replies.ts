/** Replies kept and questions in flight. */
import type { Question, Reply, Source } from "./protocol.ts";

const MOST_BYTES = 48 * 2 ** 20;

/** Asks a source, and keeps the last replies so that going back is instant. */
export class Replies {
  #source: Source;
  #most: number;
  #kept = new Map<string, Reply>();
  #bytes = 0;

  constructor(source: Source, most = MOST_BYTES) {
    this.#source = source;
    this.#most = most;
  }

  /** A reply that is at hand. */
  kept(question: Question): Reply | undefined {
    const key = JSON.stringify(question);
    const reply = this.#kept.get(key);
    if (reply) {
      this.#kept.delete(key);
      this.#kept.set(key, reply);
    }
    return reply;
  }

  /** A reply, from the source if need be. */
  async ask(question: Question): Promise<Reply> {
    const reply = await this.#source.ask(question);
    this.#keep(JSON.stringify(question), reply);
    return reply;
  }

  #keep(key: string, reply: Reply): void {
    this.#bytes += reply.bytes - (this.#kept.get(key)?.bytes ?? 0);
    this.#kept.delete(key);
    this.#kept.set(key, reply);
    for (const [old, { bytes }] of this.#kept) {
      if (this.#bytes <= this.#most || old === key) break;
      this.#kept.delete(old);
      this.#bytes -= bytes;
    }
  }
}

/**
 * One question in flight at a time; of those asked meanwhile only the newest is asked next.
 *
 * A reply that comes while others wait is shown all the same, so that a dragged slider is followed by the picture; it is
 * dropped only if a newer one was shown before.
 */
export class Newest<Q extends Question> {
  #replies: Replies;
  #done: (question: Q, reply: Reply) => void;
  #failed: (error: unknown) => void;
  #next: { question: Q; ticket: number } | null = null;
  #busy = false;
  #asked = 0;
  #shown = 0;

  constructor(replies: Replies, done: (question: Q, reply: Reply) => void, failed: (error: unknown) => void) {
    this.#replies = replies;
    this.#done = done;
    this.#failed = failed;
  }

  /** Asks, now or when the one in flight is back. */
  ask(question: Q): void {
    const ticket = ++this.#asked;
    const kept = this.#replies.kept(question);
    if (kept) {
      this.#next = null;
      this.#show(ticket, () => this.#done(question, kept));
      return;
    }
    this.#next = { question, ticket };
    if (!this.#busy) void this.#run();
  }

  /** Lets go of everything asked so far. */
  forget(): void {
    this.#next = null;
    this.#shown = this.#asked;
  }

  #show(ticket: number, show: () => void): void {
    if (ticket <= this.#shown) return;
    this.#shown = ticket;
    show();
  }

  async #run(): Promise<void> {
    this.#busy = true;
    while (this.#next) {
      const { question, ticket } = this.#next;
      this.#next = null;
      try {
        const reply = await this.#replies.ask(question);
        this.#show(ticket, () => this.#done(question, reply));
      } catch (error) {
        this.#show(ticket, () => this.#failed(error));
      }
    }
    this.#busy = false;
  }
}
