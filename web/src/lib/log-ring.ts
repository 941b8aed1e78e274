import { collapseReturns, stripAnsi } from './ansi'
import type { LogLine } from './types'

export interface RingLine {
  /** Counts from 0 for each line received; names the line for as long as it is kept. */
  seq: number
  ts: string
  stream: string
  /** As received, `\r` collapsed, with its colours. */
  raw: string
  /** What search and download see. */
  plain: string
}

export interface LogFilter {
  query: string
  /** Streams to show; empty means all. */
  streams: ReadonlySet<string>
}

/**
 * The last `capacity` log lines and the part of them that passes the filter. Adding costs O(new lines); only a change of the
 * filter walks everything. Listeners hear once per `push`, so callers batch (one push a frame).
 */
export class LogRing {
  readonly capacity: number
  private lines: RingLine[] = []
  private shown: RingLine[] = []
  private filter: LogFilter = { query: '', streams: new Set() }
  private needle = ''
  private nextSeq = 0
  private listeners = new Set<() => void>()
  private snapshot = { lines: this.shown, total: 0, received: 0, evicted: 0 }

  constructor(capacity = 50_000) {
    this.capacity = capacity
  }

  push(batch: readonly LogLine[]): void {
    if (batch.length === 0) return
    const before = this.shown.length
    for (const entry of batch) {
      const raw = collapseReturns(entry.line)
      const line: RingLine = { seq: this.nextSeq++, ts: entry.ts, stream: entry.stream, raw, plain: stripAnsi(raw) }
      this.lines.push(line)
      if (this.passes(line)) this.shown.push(line)
    }
    let evicted = 0
    // Eviction in steps of a tenth keeps the cost of moving the array amortised.
    if (this.lines.length > this.capacity * 1.1) {
      this.lines = this.lines.slice(this.lines.length - this.capacity)
      const first = this.lines[0]?.seq ?? 0
      const keepFrom = this.shown.findIndex((line) => line.seq >= first)
      evicted = keepFrom < 0 ? this.shown.length : keepFrom
      this.shown = keepFrom < 0 ? [] : this.shown.slice(keepFrom)
      evicted = Math.min(evicted, before)
    }
    this.publish(evicted)
  }

  clear(): void {
    this.lines = []
    this.shown = []
    this.publish(0)
  }

  setFilter(filter: LogFilter): void {
    this.filter = filter
    this.needle = filter.query.toLowerCase()
    this.shown = this.lines.filter((line) => this.passes(line))
    this.publish(0)
  }

  /** All kept lines as text, one a line, with their time and stream. */
  text(): string {
    return this.lines.map((line) => `${line.ts} ${line.stream} ${line.plain}\n`).join('')
  }

  subscribe = (listener: () => void): (() => void) => {
    this.listeners.add(listener)
    return () => this.listeners.delete(listener)
  }

  /** `evicted`: rows that left the front of `lines` by the last push, for keeping the reader's place. */
  getSnapshot = (): { lines: readonly RingLine[]; total: number; received: number; evicted: number } => this.snapshot

  private passes(line: RingLine): boolean {
    if (this.filter.streams.size > 0 && !this.filter.streams.has(line.stream)) return false
    return this.needle === '' || line.plain.toLowerCase().includes(this.needle)
  }

  private publish(evicted: number): void {
    this.snapshot = { lines: this.shown, total: this.lines.length, received: this.nextSeq, evicted }
    for (const listener of this.listeners) listener()
  }
}
