import { describe, expect, it, vi } from 'vitest'
import { LogRing } from './log-ring'
import type { LogLine } from './types'

const line = (n: number, stream = 'stdout'): LogLine => ({ ts: `2026-01-01T00:00:${String(n % 60).padStart(2, '0')}Z`, stream, line: `line ${n}` })
const lines = (from: number, count: number) => Array.from({ length: count }, (_, i) => line(from + i))

describe('LogRing', () => {
  it('keeps the newest and tells how many rows left the front', () => {
    const ring = new LogRing(100)
    ring.push(lines(0, 105))
    expect(ring.getSnapshot()).toMatchObject({ total: 105, evicted: 0 })
    ring.push(lines(105, 20))
    const { total, evicted, received, lines: shown } = ring.getSnapshot()
    expect(total).toBe(100)
    expect(evicted).toBe(25)
    expect(received).toBe(125)
    expect(shown[0]?.plain).toBe('line 25')
    expect(shown.at(-1)?.plain).toBe('line 124')
  })
  it('filters by text without regard to case or colours, and by stream', () => {
    const ring = new LogRing(100)
    ring.push([
      { ts: '', stream: 'stdout', line: '\x1b[31mER\x1b[0mROR one' },
      { ts: '', stream: 'stderr', line: 'error two' },
      { ts: '', stream: 'stdout', line: 'fine' },
    ])
    ring.setFilter({ query: 'Error', streams: new Set() })
    expect(ring.getSnapshot().lines.map((l) => l.plain)).toEqual(['ERROR one', 'error two'])
    ring.setFilter({ query: 'error', streams: new Set(['stderr']) })
    expect(ring.getSnapshot().lines.map((l) => l.plain)).toEqual(['error two'])
    ring.push([{ ts: '', stream: 'stderr', line: 'ERROR three' }, { ts: '', stream: 'stdout', line: 'error four' }])
    expect(ring.getSnapshot().lines.map((l) => l.plain)).toEqual(['error two', 'ERROR three'])
    expect(ring.getSnapshot().total).toBe(5)
  })
  it('counts evicted rows among those shown only', () => {
    const ring = new LogRing(10)
    ring.setFilter({ query: '5', streams: new Set() })
    ring.push(lines(0, 10))
    ring.push(lines(10, 10))
    expect(ring.getSnapshot().evicted).toBe(1)
    expect(ring.getSnapshot().lines.map((l) => l.plain)).toEqual(['line 15'])
  })
  it('tells its listeners once a push, and not at all for nothing', () => {
    const ring = new LogRing(10)
    const heard = vi.fn()
    const stop = ring.subscribe(heard)
    ring.push(lines(0, 5))
    ring.push([])
    expect(heard).toHaveBeenCalledTimes(1)
    stop()
    ring.push(lines(5, 1))
    expect(heard).toHaveBeenCalledTimes(1)
  })
  it('takes 5,000 lines a second without noticing', () => {
    const ring = new LogRing()
    ring.setFilter({ query: 'line 1', streams: new Set() })
    for (let n = 0; n < 120_000; n += 1000) ring.push(lines(n, 1000))
    const { total, received } = ring.getSnapshot()
    expect(received).toBe(120_000)
    expect(total).toBeGreaterThanOrEqual(50_000)
    expect(total).toBeLessThanOrEqual(55_000)
  })
  it('writes its lines as text without colours', () => {
    const ring = new LogRing(10)
    ring.push([{ ts: 't', stream: 'stdout', line: '\x1b[1mhi' }])
    expect(ring.text()).toBe('t stdout hi\n')
  })
})
