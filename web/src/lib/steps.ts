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
