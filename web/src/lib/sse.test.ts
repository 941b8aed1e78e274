import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { openEventStream, type StreamStatus } from './sse'

class FakeSource extends EventTarget {
  static all: FakeSource[] = []
  closed = false
  readonly url: string
  constructor(url: string | URL) {
    super()
    this.url = String(url)
    FakeSource.all.push(this)
  }
  close() {
    this.closed = true
  }
  say(name: string, data: unknown, id = '') {
    this.dispatchEvent(new MessageEvent(name, { data: JSON.stringify(data), lastEventId: id }))
  }
}
const last = () => FakeSource.all.at(-1) as FakeSource

describe('openEventStream', () => {
  beforeEach(() => {
    FakeSource.all = []
    vi.useFakeTimers()
    vi.stubGlobal('EventSource', FakeSource)
  })
  afterEach(() => {
    vi.useRealTimers()
    vi.unstubAllGlobals()
  })
  const open = () => {
    const statuses: StreamStatus[] = []
    const events: unknown[] = []
    const gap = vi.fn()
    const stream = openEventStream({ url: '/v1/x', query: { tail: '5' }, events: ['log'], onEvent: (_, data) => events.push(data), onStatus: (s) => statuses.push(s), onGap: gap })
    return { stream, statuses, events, gap, kinds: () => statuses.map((s) => s.kind) }
  }

  it('resumes after the last event it heard, with growing pauses', () => {
    const { kinds, events } = open()
    expect(new URL(last().url).searchParams.get('after')).toBeNull()
    last().dispatchEvent(new Event('open'))
    last().say('log', { line: 'a' }, '41')
    last().dispatchEvent(new Event('error'))
    expect(kinds()).toEqual(['connecting', 'live', 'retrying'])
    vi.advanceTimersByTime(700)
    expect(FakeSource.all).toHaveLength(2)
    expect(new URL(last().url).searchParams.get('after')).toBe('41')
    last().dispatchEvent(new Event('error'))
    vi.advanceTimersByTime(700)
    expect(FakeSource.all).toHaveLength(2)
    vi.advanceTimersByTime(700)
    expect(FakeSource.all).toHaveLength(3)
    expect(events).toEqual([{ line: 'a' }])
  })
  it('stops for good at an end event', () => {
    const { statuses } = open()
    last().say('end', { reason: 'not_running' })
    expect(statuses.at(-1)).toEqual({ kind: 'ended', reason: 'not_running' })
    last().dispatchEvent(new Event('error'))
    vi.advanceTimersByTime(60_000)
    expect(FakeSource.all).toHaveLength(1)
    expect(last().closed).toBe(true)
  })
  it('comes back after an end that passes, such as the server’s own restart', () => {
    const { kinds } = open()
    last().say('end', { reason: 'shutdown' })
    last().dispatchEvent(new Event('error'))
    expect(kinds().at(-1)).toBe('retrying')
    vi.advanceTimersByTime(700)
    expect(FakeSource.all).toHaveLength(2)
  })
  it('tells of a gap, and reconnects at once when the network is back', () => {
    const { gap } = open()
    last().say('gap', { after: 7 })
    expect(gap).toHaveBeenCalledOnce()
    last().dispatchEvent(new Event('error'))
    window.dispatchEvent(new Event('online'))
    expect(FakeSource.all).toHaveLength(2)
  })
  it('does nothing more once closed', () => {
    const { stream } = open()
    last().dispatchEvent(new Event('error'))
    stream.close()
    vi.advanceTimersByTime(60_000)
    expect(FakeSource.all).toHaveLength(1)
  })
})
