export type StreamStatus =
  | { kind: 'connecting' }
  | { kind: 'live' }
  | { kind: 'retrying'; at: number }
  | { kind: 'ended'; reason: string }

export interface EventStreamOptions {
  /** Address without the resume point. */
  url: string
  query?: Record<string, string>
  /** Names of the events to hear, beside `end` and `gap`. */
  events: string[]
  onEvent: (name: string, data: unknown, id: string) => void
  onStatus: (status: StreamStatus) => void
  /** The server's buffer no longer reaches back to the resume point: something was missed. */
  onGap?: () => void
  /** Resume point to start from. */
  after?: string
}

/** Ends that say nothing about what is streamed: the same stream can be had again in a moment. */
const PASSING = new Set(['shutdown', 'overflow', 'node_unreachable', 'runtime_failed'])
const BACKOFF_MS = [500, 1000, 2000, 4000, 8000, 15_000]

/**
 * An EventSource that says when it will try again. The browser's own retry is opaque and gives up for ever on an error status;
 * this one backs off with jitter and resumes with `?after=` (a new EventSource cannot set Last-Event-ID).
 */
export function openEventStream(options: EventStreamOptions): { close: () => void } {
  let source: EventSource | undefined
  let timer: ReturnType<typeof setTimeout> | undefined
  let attempt = 0
  let lastId = options.after ?? ''
  let closed = false

  const connect = () => {
    timer = undefined
    if (closed) return
    const url = new URL(options.url, location.origin)
    for (const [key, value] of Object.entries(options.query ?? {})) url.searchParams.set(key, value)
    if (lastId) url.searchParams.set('after', lastId)
    if (attempt === 0) options.onStatus({ kind: 'connecting' })
    const current = new EventSource(url)
    source = current
    current.addEventListener('open', () => {
      attempt = 0
      options.onStatus({ kind: 'live' })
    })
    const again = () => {
      current.close()
      if (closed || source !== current || timer !== undefined) return
      const base = BACKOFF_MS[Math.min(attempt, BACKOFF_MS.length - 1)] ?? 15_000
      const wait = base * (0.75 + Math.random() * 0.5)
      attempt++
      options.onStatus({ kind: 'retrying', at: Date.now() + wait })
      timer = setTimeout(connect, wait)
    }
    current.addEventListener('error', again)
    const hear = (name: string, handler: (data: unknown, id: string) => void) =>
      current.addEventListener(name, (event) => {
        const message = event as MessageEvent<string>
        if (message.lastEventId) lastId = message.lastEventId
        let data: unknown
        try {
          data = JSON.parse(message.data)
        } catch {
          data = message.data
        }
        handler(data, message.lastEventId)
      })
    for (const name of options.events) hear(name, (data, id) => options.onEvent(name, data, id))
    hear('gap', () => options.onGap?.())
    hear('end', (data) => {
      const reason = (data as { reason?: unknown } | null)?.reason
      if (typeof reason === 'string' && PASSING.has(reason)) {
        again()
        return
      }
      close()
      options.onStatus({ kind: 'ended', reason: typeof reason === 'string' ? reason : 'end' })
    })
  }

  const online = () => {
    // The network is back: no reason to sit out the rest of a long pause.
    if (timer === undefined || closed) return
    clearTimeout(timer)
    timer = undefined
    connect()
  }
  addEventListener('online', online)

  const close = () => {
    closed = true
    clearTimeout(timer)
    source?.close()
    removeEventListener('online', online)
  }
  connect()
  return { close }
}
