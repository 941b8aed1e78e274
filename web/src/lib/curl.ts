import { shellQuote } from './format'
import type { CreateWorkload } from './types'

/** The same deploy from a terminal. */
export function deployCurl(origin: string, org: string, body: CreateWorkload): string {
  return [
    `curl ${origin}/v1/orgs/${org}/workloads \\`,
    `  -H "Authorization: Bearer $CLAWHQ_API_KEY" \\`,
    `  -H 'Prefer: wait=30' \\`,
    `  --json ${shellQuote(JSON.stringify(body))}`,
  ].join('\n')
}

export function logsCurl(origin: string, org: string, workload: string): string {
  return `curl -N -H "Authorization: Bearer $CLAWHQ_API_KEY" \\\n  '${origin}/v1/orgs/${org}/workloads/${workload}/logs/stream?follow=true&tail=100'`
}
