import { describe, expect, it } from 'vitest'
import { looksSecret, parseDotenv } from './dotenv'

const pairs = (text: string) => Object.fromEntries(parseDotenv(text).pairs.map((p) => [p.key, p.value]))

describe('parseDotenv', () => {
  it('reads plain, exported, quoted and empty values', () => {
    expect(pairs('A=1\nexport B = two words \nC="x\\ny"\nD=\'$HOME\\n\'\nE=')).toEqual({ A: '1', B: 'two words', C: 'x\ny', D: '$HOME\\n', E: '' })
  })
  it('skips comments and blank lines, and keeps a # inside a value', () => {
    expect(pairs('# head\n\nURL=http://x/#frag # tail\nQ="a # b"')).toEqual({ URL: 'http://x/#frag', Q: 'a # b' })
  })
  it('takes a quoted value over several lines', () => {
    expect(pairs('KEY="-----BEGIN\nabc\n-----END"\nNEXT=1')).toEqual({ KEY: '-----BEGIN\nabc\n-----END', NEXT: '1' })
  })
  it('does not let a missing quote swallow the lines after it', () => {
    expect(pairs('A="open\nB=2')).toEqual({ A: '"open', B: '2' })
  })
  it('reads Windows line ends, and lets the last assignment of a key win', () => {
    expect(pairs('A=1\r\nB=2\r\nA=3')).toEqual({ A: '3', B: '2' })
  })
  it('names the lines that are no assignment', () => {
    expect(parseDotenv('A=1\nwhat is this\n1B=2').bad).toEqual([2, 3])
  })
})

describe('looksSecret', () => {
  it.each(['OPENAI_API_KEY', 'SLACK_TOKEN', 'DB_PASSWORD', 'SECRET', 'DATABASE_URL', 'SENTRY_DSN'])('%s', (key) => expect(looksSecret(key)).toBe(true))
  it.each(['LOG_LEVEL', 'PORT', 'KEYBOARD', 'TOKENIZER', 'API_URL', 'MONKEY'])('not %s', (key) => expect(looksSecret(key)).toBe(false))
})
