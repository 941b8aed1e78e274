import { Dialog } from './ui/dialog'
import { Kbd } from './ui/misc'
import { setSingleKeys, useSingleKeys } from '@/lib/shortcuts'
import { isMac } from './shell'

const groups: { title: string; rows: [string, string[]][] }[] = [
  {
    title: 'Anywhere',
    rows: [
      ['Search and commands', ['mod', 'K']],
      ['Keyboard shortcuts', ['?']],
      ['Deploy a workload', ['N']],
      ['Search this list', ['/']],
    ],
  },
  {
    title: 'Go to',
    rows: [
      ['Workloads', ['G', 'W']],
      ['Secrets', ['G', 'S']],
      ['Activity', ['G', 'A']],
      ['Members', ['G', 'M']],
      ['API keys', ['G', 'K']],
      ['Account', ['G', 'U']],
    ],
  },
  {
    title: 'On a workload',
    rows: [
      ['Overview, logs, terminal, …', ['1', '–', '6']],
      ['Follow the log, or pause', ['F']],
      ['Next, previous match in the log', ['Enter', '⇧ Enter']],
      ['Leave the terminal', ['Ctrl', '⇧', 'Esc']],
    ],
  },
]

export default function ShortcutSheet(props: { open: boolean; onOpenChange: (open: boolean) => void }) {
  const on = useSingleKeys()
  return (
    <Dialog {...props} title="Keyboard shortcuts" size="lg">
      <div className="grid gap-x-10 gap-y-6 sm:grid-cols-2">
        {groups.map((group) => (
          <section key={group.title}>
            <h3 className="mb-2 text-xs font-medium text-muted">{group.title}</h3>
            <dl className="space-y-1.5">
              {group.rows.map(([what, pressed]) => (
                <div key={what} className="flex items-center justify-between gap-4 text-sm">
                  <dt>{what}</dt>
                  <dd className="flex shrink-0 gap-1">
                    {pressed.map((key) => (key === '–' ? <span key={key}>–</span> : <Kbd key={key}>{key === 'mod' ? (isMac() ? '⌘' : 'Ctrl') : key}</Kbd>))}
                  </dd>
                </div>
              ))}
            </dl>
          </section>
        ))}
      </div>
      <label className="mt-6 flex items-start gap-2.5 border-t border-line pt-4 text-sm">
        <input type="checkbox" checked={on} onChange={(event) => setSingleKeys(event.target.checked)} className="mt-0.5 size-4 accent-(--accent)" />
        <span>
          Single-key shortcuts
          <span className="block text-xs text-muted">Switch them off if you dictate text or press keys by accident. {isMac() ? '⌘K' : 'Ctrl K'} stays.</span>
        </span>
      </label>
    </Dialog>
  )
}
