import { type ReactNode, useState } from 'react'
import { Button } from './button'
import { Dialog } from './dialog'
import { Field, Input } from './field'
import { ProblemNote } from './problem'

/** Asks before something that cannot be undone; with `phrase`, it must be typed. */
export function Confirm(props: {
  open: boolean
  onOpenChange: (open: boolean) => void
  title: string
  children: ReactNode
  action: string
  phrase?: string
  onConfirm: () => Promise<unknown>
}) {
  const [typed, setTyped] = useState('')
  const [busy, setBusy] = useState(false)
  const [error, setError] = useState<unknown>(null)
  const ready = props.phrase === undefined || typed === props.phrase
  const close = (open: boolean) => {
    if (busy) return
    setTyped('')
    setError(null)
    props.onOpenChange(open)
  }
  const run = async () => {
    if (!ready || busy) return
    setBusy(true)
    setError(null)
    try {
      await props.onConfirm()
      setTyped('')
      props.onOpenChange(false)
    } catch (e) {
      setError(e)
    } finally {
      setBusy(false)
    }
  }
  return (
    <Dialog
      open={props.open}
      onOpenChange={close}
      title={props.title}
      size="sm"
      footer={
        <>
          <Button onClick={() => close(false)}>Cancel</Button>
          <Button variant="danger" disabled={!ready} busy={busy} onClick={() => void run()}>
            {props.action}
          </Button>
        </>
      }
    >
      <form
        className="space-y-4"
        onSubmit={(event) => {
          event.preventDefault()
          void run()
        }}
      >
        <div className="text-sm text-ink-2">{props.children}</div>
        {props.phrase !== undefined && (
          <Field
            label={
              <>
                Type <span className="font-mono text-accent-ink">{props.phrase}</span> to confirm
              </>
            }
          >
            <Input value={typed} onChange={(event) => setTyped(event.target.value)} autoComplete="off" spellCheck={false} className="font-mono" />
          </Field>
        )}
        {error !== null && <ProblemNote error={error} />}
      </form>
    </Dialog>
  )
}
