import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'

interface Lock {
  packages: Record<string, { version?: string; resolved?: string; integrity?: string; hasInstallScript?: boolean; link?: boolean }>
}
const json = <T,>(path: string) => JSON.parse(readFileSync(path, 'utf8')) as T

describe.each(['.', 'tools'])('what %s installs', (folder) => {
  const manifest = json<Record<string, Record<string, string>>>(`${folder}/package.json`)
  const lock = json<Lock>(`${folder}/package-lock.json`)
  const entries = Object.entries(lock.packages).filter(([path]) => path !== '')

  it('is pinned to exact versions', () => {
    const loose = Object.entries({ ...manifest.dependencies, ...manifest.devDependencies }).filter(([, range]) => !/^\d+\.\d+\.\d+$/.test(range))
    expect(loose).toEqual([])
  })
  it('runs no code at install, comes from no git address, and is checked by a hash', () => {
    expect(entries.length).toBeGreaterThan(10)
    expect(entries.filter(([, p]) => p.hasInstallScript === true)).toEqual([])
    expect(entries.filter(([, p]) => p.link === true || /^git|^file:/.test(p.resolved ?? ''))).toEqual([])
    expect(entries.filter(([, p]) => !p.integrity?.startsWith('sha512-')).map(([path]) => path)).toEqual([])
  })
  it('names no registry', () => expect(entries.filter(([, p]) => p.resolved?.includes('://'))).toEqual([]))
  it('keeps install scripts switched off', () => expect(readFileSync(`${folder}/.npmrc`, 'utf8')).toMatch(/^ignore-scripts=true$/m))
})
