const names: Record<string, string> = {
  accepted: 'Accepted',
  admit: 'Checked',
  admitted: 'Checked',
  authenticate: 'Signed in',
  validate: 'Checked',
  commit: 'Recorded',
  committed: 'Recorded',
  store: 'Recorded',
  transaction: 'Recorded',
  placed: 'Placed',
  place: 'Placed',
  queue: 'Waited for room',
  claim: 'Claimed',
  claimed: 'Claimed',
  dispatch: 'Sent to the node',
  dispatched: 'Sent to the node',
  image: 'Image ready',
  image_ready: 'Image ready',
  pull: 'Image ready',
  create: 'Container created',
  created: 'Container created',
  thaw: 'Thawed',
  start: 'Process started',
  started: 'Process started',
  ready: 'Answering',
  healthy: 'Answering',
  probe: 'Answering',
  observed: 'Confirmed',
  observe: 'Confirmed',
}

/** A step's name for people; one this console does not know is shown as it came. */
export function stepLabel(name: string): string {
  const known = names[name]
  if (known) return known
  const words = name.replaceAll(/[_-]+/g, ' ').trim()
  return words === '' ? 'Step' : words[0]?.toUpperCase() + words.slice(1)
}

/**
 * The steps of an instance's first start, with what went before the first of them: its node tells those, and the control plane's
 * own part is the rest of the whole.
 */
export function startSteps(instance: { steps: readonly { name: string; ms: number }[]; total_ms: number | null; restarts: number; placement: string }): readonly { name: string; ms: number }[] {
  const { steps, total_ms, restarts, placement } = instance
  const before = (total_ms ?? 0) - steps.reduce((acc, step) => acc + Math.max(0, step.ms), 0)
  // Those of a later run are not parts of that whole.
  if (restarts > 0 || before <= 0) return steps
  return [{ name: placement === 'queued' ? 'queue' : 'commit', ms: before }, ...steps]
}

export interface Bar {
  name: string
  label: string
  ms: number
  /** Both in percent of the whole. */
  left: number
  width: number
}

/** The steps of a deploy, one after another, as bars of a waterfall. */
export function waterfall(steps: readonly { name: string; ms: number }[]): { bars: Bar[]; total: number } {
  const sum = steps.reduce((acc, step) => acc + Math.max(0, step.ms), 0)
  let at = 0
  const bars = steps.map((step) => {
    const ms = Math.max(0, step.ms)
    const bar = {
      name: step.name,
      label: stepLabel(step.name),
      ms,
      left: sum === 0 ? 0 : (at / sum) * 100,
      width: sum === 0 ? 0 : (ms / sum) * 100,
    }
    at += ms
    return bar
  })
  return { bars, total: sum }
}
