import { describe, expect, it } from 'vitest'
import { collapseReturns, parseAnsi, stripAnsi } from './ansi'

describe('parseAnsi', () => {
  it('splits a line by style', () => {
    expect(parseAnsi('a\x1b[1;31mb\x1b[0mc')).toEqual([{ text: 'a' }, { text: 'b', bold: true, fg: 1 }, { text: 'c' }])
  })
  it('knows bright, indexed and true colours', () => {
    expect(parseAnsi('\x1b[92mx\x1b[38;5;196my\x1b[48;2;1;2;300mz')).toEqual([
      { text: 'x', fg: 10 },
      { text: 'y', fg: 'rgb(255 0 0)' },
      { text: 'z', fg: 'rgb(255 0 0)', bg: 'rgb(1 2 255)' },
    ])
  })
  it('drops everything that is no colour: cursor moves, titles, hyperlinks, bells', () => {
    expect(stripAnsi('\x1b[2K\x1b[1Gok\x1b]0;title\x07\x1b]8;;http://x\x1b\\link\x07')).toBe('oklink')
    expect(parseAnsi('\x1b[2Kok').map((s) => s.text).join('')).toBe('ok')
  })
  it('survives what is cut off or nonsense', () => {
    for (const line of ['\x1b', '\x1b[', '\x1b[38;5m', '\x1b[38;2;1mx', '\x1b]0;no end', '\x1b[999999mx', '\x1b[;;;;mx']) expect(() => parseAnsi(line)).not.toThrow()
  })
})

describe('collapseReturns', () => {
  it('shows what a terminal would', () => {
    expect(collapseReturns('10 %\r50 %\r100 %')).toBe('100 %')
    expect(collapseReturns('line\r')).toBe('line')
    expect(collapseReturns('plain')).toBe('plain')
  })
})
