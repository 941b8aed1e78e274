import '@xterm/xterm/css/xterm.css'
import { FitAddon } from '@xterm/addon-fit'
import { Terminal } from '@xterm/xterm'
import { useEffect, useRef, useState } from 'react'
import { Button, Spinner } from '@/components/ui/button'
import { Dot, Kbd } from '@/components/ui/misc'
import { api, streams } from '@/lib/api'
import { asApiError } from '@/lib/problem'
import { AckCounter, readExit, type TermStatus } from '@/lib/term'

const theme = {
  background: '#161413',
  foreground: '#e8e4df',
  cursor: '#ff8a57',
  cursorAccent: '#161413',
  selectionBackground: '#ff8a5755',
  black: '#4a4642',
  red: '#ff7b72',
  green: '#7ee081',
  yellow: '#e8c468',
  blue: '#79b8ff',
  magenta: '#d2a8ff',
  cyan: '#6fd6d6',
  white: '#dcd8d3',
  brightBlack: '#8b8782',
  brightRed: '#ff9a92',
  brightGreen: '#a0efa2',
  brightYellow: '#f5d88a',
  brightBlue: '#a5d0ff',
  brightMagenta: '#e2c5ff',
  brightCyan: '#98e8e8',
  brightWhite: '#ffffff',
}

/** A terminal in the workload's container: one ticket, one WebSocket. Reconnecting starts a new shell. */
export default function TerminalScreen({ org, name }: { org: string; name: string }) {
  const host = useRef<HTMLDivElement>(null)
  const [status, setStatus] = useState<TermStatus>({ kind: 'connecting' })
  const [attempt, setAttempt] = useState(0)

  useEffect(() => {
    const element = host.current
    if (!element) return
    const term = new Terminal({
      fontFamily: '"Geist Mono", ui-monospace, "Liberation Mono", monospace',
      fontSize: 13,
      lineHeight: 1.25,
      cursorBlink: !matchMedia('(prefers-reduced-motion: reduce)').matches,
      scrollback: 10_000,
      theme,
      screenReaderMode: true,
    })
    const fit = new FitAddon()
    term.loadAddon(fit)
    term.open(element)
    fit.fit()
    term.textarea?.setAttribute('aria-label', `Terminal of ${name}. Control Shift Escape leaves it.`)

    let socket: WebSocket | undefined
    let gone = false
    let ended = false
    const control = (frame: Record<string, unknown>) => {
      if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(frame))
    }
    // Tab belongs to the shell in here; this is the way out for those who have no mouse.
    term.attachCustomKeyEventHandler((event) => {
      if (event.ctrlKey && event.shiftKey && event.key === 'Escape') {
        if (event.type === 'keydown') {
          term.blur()
          document.querySelector<HTMLElement>('[data-tab="Terminal"]')?.focus()
        }
        return false
      }
      return true
    })
    const encoder = new TextEncoder()
    const bytes = (text: string) => Uint8Array.from(text, (c) => c.charCodeAt(0))
    term.onData((data) => {
      if (socket?.readyState === WebSocket.OPEN) socket.send(encoder.encode(data))
    })
    term.onBinary((data) => {
      if (socket?.readyState === WebSocket.OPEN) socket.send(bytes(data))
    })
    term.onResize(({ cols, rows }) => control({ type: 'resize', cols, rows }))

    const connect = async () => {
      setStatus({ kind: 'connecting' })
      try {
        const { ticket } = await api.terminalTicket(org, name)
        if (gone) return
        const url = streams.terminal(org, name, { ticket, cols: String(term.cols), rows: String(term.rows) })
        const ws = new WebSocket(url, 'term.v1')
        ws.binaryType = 'arraybuffer'
        socket = ws
        const acks = new AckCounter()
        ws.addEventListener('open', () => {
          setStatus({ kind: 'open' })
          term.focus()
        })
        ws.addEventListener('message', (event: MessageEvent<ArrayBuffer | string>) => {
          if (typeof event.data === 'string') {
            const exit = readExit(event.data)
            if (exit) {
              ended = true
              setStatus({ kind: 'exited', ...exit })
            }
            return
          }
          const chunk = new Uint8Array(event.data)
          // Acknowledged once shown: a program that writes faster than this page draws is slowed down, not the page.
          term.write(chunk, () => {
            const ack = acks.shown(chunk.byteLength)
            if (ack !== undefined) control({ type: 'ack', bytes: ack })
          })
        })
        ws.addEventListener('close', (event) => {
          if (!gone && !ended) setStatus({ kind: 'lost', why: event.reason || 'The connection broke off.' })
        })
      } catch (error) {
        if (!gone) setStatus({ kind: 'lost', why: asApiError(error).message })
      }
    }
    void connect()

    let frame = 0
    const observer = new ResizeObserver(() => {
      cancelAnimationFrame(frame)
      frame = requestAnimationFrame(() => fit.fit())
    })
    observer.observe(element)
    return () => {
      gone = true
      cancelAnimationFrame(frame)
      observer.disconnect()
      socket?.close(1000)
      term.dispose()
    }
  }, [org, name, attempt])

  const over = status.kind === 'exited' || status.kind === 'lost'
  return (
    <section aria-label="Terminal" className="card flex h-[max(20rem,calc(100dvh-16.5rem))] flex-col overflow-hidden">
      <div className="flex min-h-10 flex-wrap items-center justify-between gap-x-4 gap-y-1 border-b border-line px-3 py-1.5 text-xs text-muted">
        <span className="inline-flex items-center gap-2" data-testid="terminal-status" data-status={status.kind} aria-live="polite">
          {status.kind === 'connecting' ? <Spinner /> : <Dot tone={status.kind === 'open' ? 'ok' : status.kind === 'lost' ? 'bad' : 'idle'} />}
          {status.kind === 'connecting' && 'Opening a shell…'}
          {status.kind === 'open' && 'Connected'}
          {status.kind === 'exited' && (status.code === null ? (status.reason ?? 'The shell ended') : `The shell ended with exit code ${status.code}${status.reason ? `: ${status.reason}` : ''}`)}
          {status.kind === 'lost' && status.why}
        </span>
        <span className="flex items-center gap-1 max-sm:hidden">
          <Kbd>Ctrl</Kbd>
          <Kbd>Shift</Kbd>
          <Kbd>Esc</Kbd>
          <span className="ml-1">leaves the terminal</span>
        </span>
        {over && (
          <Button size="sm" onClick={() => setAttempt((n) => n + 1)}>
            New shell
          </Button>
        )}
      </div>
      <div className="min-h-0 flex-1 bg-[#161413] p-3">
        <div ref={host} className="h-full" data-testid="terminal" />
      </div>
    </section>
  )
}
