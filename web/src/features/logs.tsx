import { useQuery } from '@tanstack/react-query'
import { useVirtualizer } from '@tanstack/react-virtual'
import { ArrowDown, Clock, Download, Pause, Play, ScrollText, Search, WrapText } from 'lucide-react'
import { memo, type ReactNode, useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState, useSyncExternalStore } from 'react'
import { Button } from '@/components/ui/button'
import { CopyButton, Dot } from '@/components/ui/misc'
import { parseAnsi, type Span, stripAnsi } from '@/lib/ansi'
import { streams } from '@/lib/api'
import { cn } from '@/lib/cn'
import { logsCurl } from '@/lib/curl'
import { LogRing, type RingLine } from '@/lib/log-ring'
import { LogResume } from '@/lib/log-resume'
import { workloadQuery } from '@/lib/queries'
import { useShortcuts } from '@/lib/shortcuts'
import { openEventStream, type StreamStatus } from '@/lib/sse'
import { logSource } from '@/lib/states'
import { readPref, writePref } from '@/lib/storage'
import { useTitle } from '@/lib/title'
import type { LogLine } from '@/lib/types'

const ROW = 20
const TAIL = 1000

type Times = 'local' | 'utc' | 'off'

/**
 * Streams an instance's output into a ring, one push per frame. The stream is closed while the tab is hidden and resumed where
 * it was: a browser has six connections to an origin, and a hidden page has no use for one. Lines of earlier instances stay.
 */
function useLogStream(org: string, name: string, instance: string | null | undefined): { ring: LogRing; status: StreamStatus } {
  const [ring] = useState(() => new LogRing())
  const [status, setStatus] = useState<StreamStatus>({ kind: 'connecting' })
  const shown = useRef<string | null>(null)
  useEffect(() => {
    if (!instance) return
    let queue: LogLine[] = []
    let frame = 0
    const resume = new LogResume()
    let stream: { close: () => void } | undefined
    const flush = () => {
      frame = 0
      const batch = queue
      queue = []
      ring.push(batch)
    }
    const note = (line: string) => queue.push({ ts: new Date().toISOString(), stream: 'platform', line })
    const open = () => {
      stream = openEventStream({
        url: streams.logs(org, name),
        query: { follow: 'true', tail: String(TAIL) },
        ...(resume.after ? { after: resume.after } : {}),
        events: ['log'],
        onEvent: (_, data, id) => {
          if (!resume.accept(id)) return
          queue.push(data as LogLine)
          if (frame === 0) frame = requestAnimationFrame(flush)
        },
        onGap: () => note('Some lines are missing here: they were written faster than they could be kept.'),
        onStatus: (next) => {
          if (next.kind === 'live') resume.reconnected()
          setStatus(next)
        },
      })
    }
    const visibility = () => {
      if (document.hidden) {
        stream?.close()
        stream = undefined
      } else if (!stream) open()
    }
    // A remount of the same instance reads its tail anew; another instance goes on below.
    if (shown.current === instance) ring.clear()
    else if (shown.current !== null) note('A new container took over.')
    shown.current = instance
    if (!document.hidden) open()
    document.addEventListener('visibilitychange', visibility)
    return () => {
      document.removeEventListener('visibilitychange', visibility)
      cancelAnimationFrame(frame)
      stream?.close()
    }
  }, [org, name, ring, instance])
  return { ring, status: instance === null ? { kind: 'ended', reason: 'not_running' } : status }
}

export function LogsTab({ org, name }: { org: string; name: string }) {
  useTitle('Logs', name)
  const { data: workload } = useQuery(workloadQuery(org, name))
  const { ring, status } = useLogStream(org, name, workload && logSource(workload))
  const { lines, total, received, evicted } = useSyncExternalStore(ring.subscribe, ring.getSnapshot)

  const [query, setQuery] = useState('')
  const [onlyErr, setOnlyErr] = useState(false)
  const [wrap, setWrap] = useState(() => readPref('logs.wrap') === 'on')
  const [times, setTimes] = useState<Times>(() => (readPref('logs.times') as Times | null) ?? 'local')
  const [follow, setFollow] = useState(true)
  const [seen, setSeen] = useState(0)
  const [match, setMatch] = useState(-1)
  const scroller = useRef<HTMLDivElement>(null)
  const search = useRef<HTMLInputElement>(null)
  const userUntil = useRef(0)

  useEffect(() => ring.setFilter({ query, streams: new Set(onlyErr ? ['stderr'] : []) }), [ring, query, onlyErr])

  const virtual = useVirtualizer({
    count: lines.length,
    getScrollElement: () => scroller.current,
    estimateSize: () => ROW,
    overscan: 12,
    getItemKey: useCallback((index: number) => lines[index]?.seq ?? index, [lines]),
  })

  const height = virtual.getTotalSize()

  // Keeps the reader's place: new lines move the view only while it follows, and lines that leave the front pull it along.
  const lastEvicted = useRef<unknown>(null)
  useLayoutEffect(() => {
    const element = scroller.current
    if (!element) return
    if (follow) {
      element.scrollTop = element.scrollHeight
    } else if (evicted > 0 && lastEvicted.current !== lines) {
      element.scrollTop = Math.max(0, element.scrollTop - evicted * ROW)
    }
    lastEvicted.current = lines
  }, [lines, evicted, follow, wrap, height])

  // Only a person's own scrolling changes whether it follows; scrolling done by this code or by growing content never does.
  const touched = () => {
    userUntil.current = performance.now() + 400
  }
  const onScroll = () => {
    const element = scroller.current
    if (!element || performance.now() > userUntil.current) return
    const atEnd = element.scrollHeight - element.scrollTop - element.clientHeight < ROW
    if (atEnd !== follow) {
      setFollow(atEnd)
      if (!atEnd) setSeen(received)
    }
  }
  const jump = () => {
    setFollow(true)
    setMatch(-1)
  }
  const pause = () => {
    if (follow) {
      setSeen(received)
      setFollow(false)
    } else jump()
  }
  const step = (by: number) => {
    if (lines.length === 0) return
    const next = (((match < 0 ? (by > 0 ? 0 : lines.length - 1) : match + by) % lines.length) + lines.length) % lines.length
    setFollow(false)
    setSeen(received)
    setMatch(next)
    virtual.scrollToIndex(next, { align: 'center' })
  }
  useShortcuts({ f: pause })

  const download = () => {
    const url = URL.createObjectURL(new Blob([ring.text()], { type: 'text/plain' }))
    const link = document.createElement('a')
    link.href = url
    link.download = `${name}-${new Date().toISOString().slice(0, 19).replaceAll(':', '')}.log`
    link.click()
    setTimeout(() => URL.revokeObjectURL(url), 10_000)
  }
  const tail = workload && logSource(workload) === null ? (workload.reason?.log_tail ?? []) : []
  const fresh = Math.max(0, received - seen)
  const items = virtual.getVirtualItems()
  const nextTimes: Times = times === 'local' ? 'utc' : times === 'utc' ? 'off' : 'local'

  return (
    <section aria-label="Logs" className="card flex h-[max(22rem,calc(100dvh-16.5rem))] flex-col overflow-hidden">
      <div className="flex flex-wrap items-center gap-2 border-b border-line px-3 py-2">
        <div className="relative min-w-0 flex-1 basis-32">
          <Search className="pointer-events-none absolute top-1/2 left-2.5 size-3.5 -translate-y-1/2 text-muted" aria-hidden="true" />
          <input
            ref={search}
            type="search"
            aria-label="Search the log"
            placeholder="Search…"
            value={query}
            onChange={(event) => {
              setQuery(event.target.value)
              setMatch(-1)
            }}
            onKeyDown={(event) => {
              if (event.key === 'Enter') {
                event.preventDefault()
                step(event.shiftKey ? -1 : 1)
              } else if (event.key === 'Escape') setQuery('')
            }}
            className="h-8 w-full rounded-lg border border-field/60 bg-panel pr-2.5 pl-8 text-sm hover:border-field focus-visible:border-accent focus-visible:ring-3 focus-visible:ring-accent/25 focus-visible:outline-none dark:bg-sunken"
          />
        </div>
        {query !== '' && (
          <span className="order-4 text-xs text-muted tabular sm:order-2" aria-live="polite">
            {match >= 0 ? `${match + 1} of ` : ''}
            {lines.length} {lines.length === 1 ? 'match' : 'matches'}
          </span>
        )}
        <div className="order-3 flex items-center gap-1">
          <Tool pressed={onlyErr} onClick={() => setOnlyErr(!onlyErr)} label="Only stderr">
            stderr
          </Tool>
          <Tool
            pressed={wrap}
            onClick={() => {
              setWrap(!wrap)
              writePref('logs.wrap', wrap ? 'off' : 'on')
            }}
            label="Wrap long lines"
          >
            <WrapText aria-hidden="true" />
          </Tool>
          <Button
            size="sm"
            variant="ghost"
            aria-label={`Timestamps: ${times}. Change to ${nextTimes}`}
            title="Timestamps"
            onClick={() => {
              setTimes(nextTimes)
              writePref('logs.times', nextTimes)
            }}
          >
            <Clock aria-hidden="true" />
            {times === 'utc' ? 'UTC' : times === 'local' ? 'Local' : 'Off'}
          </Button>
          <Button size="icon-sm" variant="ghost" aria-label="Download the log" title="Download" onClick={download} disabled={total === 0}>
            <Download aria-hidden="true" />
          </Button>
          <CopyButton text={logsCurl(location.origin, org, name)} label="Copy as curl" />
        </div>
        <Button size="sm" onClick={pause} className="order-2 w-22 sm:order-4" title="F">
          {follow ? <Pause aria-hidden="true" /> : <Play aria-hidden="true" />}
          {follow ? 'Pause' : 'Follow'}
        </Button>
      </div>
      <div className="relative min-h-0 flex-1 bg-term">
        {/* A scrolling region must take focus and keys (WCAG 2.1.1); the handlers only watch them. */}
        {/* oxlint-disable-next-line jsx-a11y/no-noninteractive-element-interactions */}
        <div
          ref={scroller}
          tabIndex={0}
          role="region"
          aria-label="Log lines"
          data-testid="log-lines"
          data-follow={follow}
          className="h-full overflow-auto py-2 font-mono text-xs leading-5 text-[oklch(0.92_0.004_60)] [overflow-anchor:none] focus-visible:-outline-offset-2"
          onScroll={onScroll}
          onWheel={(event) => {
            touched()
            if (event.deltaY < 0 && follow) {
              setSeen(received)
              setFollow(false)
            }
          }}
          onTouchMove={touched}
          onPointerDown={touched}
          onPointerMove={(event) => {
            if (event.buttons !== 0) touched()
          }}
          onKeyDown={(event) => {
            if (['ArrowUp', 'ArrowDown', 'PageUp', 'PageDown', 'Home', 'End', ' '].includes(event.key)) touched()
          }}
        >
          <div className={cn('relative', !wrap && 'w-max min-w-full')} style={{ height }}>
            <div className={cn(!wrap && 'w-max min-w-full')} style={{ transform: `translateY(${items[0]?.start ?? 0}px)` }}>
              {items.map((item) => {
                const line = lines[item.index]
                return line ? (
                  <div key={item.key} data-index={item.index} ref={wrap ? virtual.measureElement : undefined}>
                    <Line line={line} wrap={wrap} times={times} query={query} current={item.index === match} />
                  </div>
                ) : null
              })}
            </div>
          </div>
        </div>
        {lines.length === 0 && tail.length > 0 && query === '' && (
          <div className="absolute inset-0 overflow-auto px-3.5 py-2 font-mono text-xs leading-5 text-[oklch(0.92_0.004_60)]">
            <p className="mb-1 font-sans text-[oklch(0.74_0.006_60)]">It does not run. Its last words:</p>
            {tail.map((line, index) => (
              <p key={index} className="break-words whitespace-pre-wrap">
                {stripAnsi(line)}
              </p>
            ))}
          </div>
        )}
        {lines.length === 0 && tail.length === 0 && (
          <div className="pointer-events-none absolute inset-0 flex flex-col items-center justify-center gap-2 text-center text-sm text-[oklch(0.74_0.006_60)]">
            <ScrollText className="size-5" aria-hidden="true" />
            {query !== '' || onlyErr ? 'No line matches.' : status.kind === 'connecting' ? 'Opening the log…' : workload && logSource(workload) === null ? 'It does not run, and its log went with its container.' : 'It has written nothing yet. Lines appear here as they come.'}
          </div>
        )}
        {!follow && (
          <Button size="sm" variant="primary" onClick={jump} className="absolute bottom-3 left-1/2 -translate-x-1/2 rounded-full! px-3.5! shadow-float!">
            <ArrowDown aria-hidden="true" />
            {fresh > 0 ? `${fresh.toLocaleString('en')} new, jump to latest` : 'Jump to latest'}
          </Button>
        )}
      </div>
      <div className="flex h-8 items-center justify-between gap-3 border-t border-line px-3 text-xs text-muted tabular">
        <StreamBadge status={status} follow={follow} />
        <span>
          {total.toLocaleString('en')} {total === 1 ? 'line' : 'lines'}
          {total >= ring.capacity && ', older ones dropped'}
        </span>
      </div>
    </section>
  )
}

function Tool({ pressed, onClick, label, children }: { pressed: boolean; onClick: () => void; label: string; children: ReactNode }) {
  return (
    <Button size="sm" variant="ghost" aria-pressed={pressed} aria-label={label} title={label} onClick={onClick} className={cn(pressed && 'bg-hover text-ink!')}>
      {children}
    </Button>
  )
}

const endings: Record<string, string> = {
  ended: 'The process ended',
  not_running: 'It does not run',
  node_unreachable: 'Its host does not answer',
  overflow: 'The log came faster than it could be sent',
  shutdown: 'The server restarts',
  signed_out: 'Signed out',
}

function StreamBadge({ status, follow }: { status: StreamStatus; follow: boolean }) {
  const [now, setNow] = useState(() => Date.now())
  useEffect(() => {
    if (status.kind !== 'retrying') return
    const timer = setInterval(() => setNow(Date.now()), 500)
    return () => clearInterval(timer)
  }, [status.kind])
  const text =
    status.kind === 'live'
      ? follow
        ? 'Live'
        : 'Live, paused here'
      : status.kind === 'connecting'
        ? 'Connecting…'
        : status.kind === 'ended'
          ? (endings[status.reason] ?? `Ended: ${status.reason}`)
          : `Reconnecting in ${Math.max(0, Math.ceil((status.at - now) / 1000))} s`
  const tone = status.kind === 'live' ? 'ok' : status.kind === 'retrying' ? 'warn' : 'idle'
  return (
    <span className="inline-flex items-center gap-2" data-testid="log-status">
      <Dot tone={tone} busy={status.kind === 'retrying'} />
      {text}
    </span>
  )
}

// The log is dark in both themes, as terminals are: programs choose their colours for that.
const palette = ['#8b8782', '#ff7b72', '#7ee081', '#e8c468', '#79b8ff', '#d2a8ff', '#6fd6d6', '#dcd8d3', '#a29d97', '#ff9a92', '#a0efa2', '#f5d88a', '#a5d0ff', '#e2c5ff', '#98e8e8', '#ffffff']
const colour = (value: number | string | undefined) => (typeof value === 'number' ? palette[value] : value)

function mark(text: string, needle: string): ReactNode {
  if (needle === '') return text
  const lower = text.toLowerCase()
  const parts: ReactNode[] = []
  let at = 0
  for (let found = lower.indexOf(needle); found >= 0; found = lower.indexOf(needle, at)) {
    parts.push(
      text.slice(at, found),
      <mark key={found} className="rounded-xs bg-[oklch(0.8_0.15_80)] text-black">
        {text.slice(found, found + needle.length)}
      </mark>,
    )
    at = found + needle.length
  }
  parts.push(text.slice(at))
  return parts
}

function spanStyle(span: Span): React.CSSProperties | undefined {
  if (span.fg === undefined && span.bg === undefined && !span.bold && !span.dim && !span.italic && !span.underline) return undefined
  return {
    ...(span.fg !== undefined ? { color: colour(span.fg) } : {}),
    ...(span.bg !== undefined ? { backgroundColor: colour(span.bg) } : {}),
    ...(span.bold ? { fontWeight: 600 } : {}),
    ...(span.dim ? { opacity: 0.75 } : {}),
    ...(span.italic ? { fontStyle: 'italic' } : {}),
    ...(span.underline ? { textDecoration: 'underline' } : {}),
  }
}

const clock = new Intl.DateTimeFormat('en-GB', { hour: '2-digit', minute: '2-digit', second: '2-digit', fractionalSecondDigits: 3 })

function stamp(ts: string, times: Times): string {
  const date = new Date(ts)
  if (Number.isNaN(date.getTime())) return ts.slice(0, 12)
  return times === 'utc' ? date.toISOString().slice(11, 23) : clock.format(date)
}

const Line = memo(function Line({ line, wrap, times, query, current }: { line: RingLine; wrap: boolean; times: Times; query: string; current: boolean }) {
  const needle = query.toLowerCase()
  const spans = useMemo(() => (needle === '' ? parseAnsi(line.raw) : null), [line.raw, needle])
  return (
    <div className={cn('flex min-h-5 border-l-2 px-3 hover:bg-white/5', current && 'bg-white/10', line.stream === 'stderr' ? 'border-[oklch(0.64_0.2_22)]' : line.stream === 'platform' ? 'border-[oklch(0.7_0.14_250)]' : 'border-transparent')}>
      {times !== 'off' && (
        <time dateTime={line.ts} title={line.ts} className="mr-3 shrink-0 text-[oklch(0.66_0.006_60)] select-none">
          {stamp(line.ts, times)}
        </time>
      )}
      <span className={cn(wrap ? 'min-w-0 break-words whitespace-pre-wrap' : 'whitespace-pre')}>
        {spans ? spans.map((span, index) => <span key={index} style={spanStyle(span)}>{span.text}</span>) : mark(line.plain, needle)}
      </span>
      {line.stream === 'stderr' && <span className="sr-only"> (stderr)</span>}
    </div>
  )
})
