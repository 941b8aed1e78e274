import { readPref, writePref } from './storage'
import type { Me, Org } from './types'

/** The org to show when the address names none: the last one used here, else the first. */
export function homeOrg(me: Me): Org | undefined {
  const last = readPref('org')
  return me.orgs.find((org) => org.slug === last) ?? me.orgs[0]
}

export function rememberOrg(slug: string): void {
  writePref('org', slug)
}

/** Where to go after signing in. Only paths of this site: an address from a link must not lead away. */
export function safeNext(next: string | undefined): string | undefined {
  if (!next || !next.startsWith('/') || next.startsWith('//') || next.startsWith('/\\') || next.startsWith('/sign-')) return undefined
  return next
}
