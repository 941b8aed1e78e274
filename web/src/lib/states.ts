import type { Workload } from './types'

export type Tone = 'ok' | 'info' | 'warn' | 'bad' | 'idle'

interface StateLook {
  label: string
  tone: Tone
  /** Something is under way and will end by itself. */
  busy: boolean
}

const looks: Record<string, StateLook> = {
  queued: { label: 'Queued', tone: 'warn', busy: true },
  starting: { label: 'Starting', tone: 'info', busy: true },
  running: { label: 'Running', tone: 'ok', busy: false },
  restarting: { label: 'Restarting', tone: 'warn', busy: true },
  stopping: { label: 'Stopping', tone: 'idle', busy: true },
  stopped: { label: 'Stopped', tone: 'idle', busy: false },
  failed: { label: 'Failed', tone: 'bad', busy: false },
  unreachable: { label: 'Unreachable', tone: 'bad', busy: false },
  deleting: { label: 'Deleting', tone: 'idle', busy: true },
  deleted: { label: 'Deleted', tone: 'idle', busy: false },
}

/** How a state looks; one this console has never heard of is shown by its own name. */
export function stateLook(state: string): StateLook {
  return looks[state] ?? { label: state === '' ? 'Unknown' : state[0]?.toUpperCase() + state.slice(1), tone: 'idle', busy: false }
}

export function isTransient(state: string): boolean {
  return stateLook(state).busy
}

/** States a person should look at, worst first; the rest is sorted by name. */
const attention = ['failed', 'unreachable', 'restarting', 'queued']

export function needsAttention(workload: Pick<Workload, 'state'>): boolean {
  return attention.includes(workload.state)
}

export function byAttention(a: Workload, b: Workload): number {
  const rank = (w: Workload) => {
    const index = attention.indexOf(w.state)
    return index < 0 ? attention.length : index
  }
  return rank(a) - rank(b) || a.name.localeCompare(b.name)
}

/** The state groups of the list's filter chips. */
export function stateGroup(state: string): 'running' | 'stopped' | 'attention' | 'other' {
  if (attention.includes(state)) return 'attention'
  if (state === 'running') return 'running'
  if (state === 'stopped' || state === 'stopping') return 'stopped'
  return 'other'
}

export function canStart(w: Pick<Workload, 'state' | 'desired'>): boolean {
  return w.desired === 'stopped' && w.state !== 'deleting' && w.state !== 'deleted'
}
export function canStop(w: Pick<Workload, 'state' | 'desired'>): boolean {
  return w.desired === 'running' && w.state !== 'deleting' && w.state !== 'deleted'
}
export function canRestart(w: Pick<Workload, 'state' | 'desired'>): boolean {
  return canStop(w) && w.state !== 'queued' && w.state !== 'stopping'
}
/** The instance whose output can be read now; its log goes with its container. */
export function logSource(w: Pick<Workload, 'instance'>): string | null {
  // One that was never started has no log to ask for.
  return w.instance && w.instance.started_at !== null && w.instance.ended_at === null ? w.instance.id : null
}
/** Whether there is a process to talk to. */
export function hasProcess(w: Pick<Workload, 'state'>): boolean {
  return w.state === 'running' || w.state === 'restarting'
}
