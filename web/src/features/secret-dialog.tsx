import { useQueryClient } from '@tanstack/react-query'
import { Eye, EyeOff } from 'lucide-react'
import { useState } from 'react'
import { Button } from '@/components/ui/button'
import { Dialog } from '@/components/ui/dialog'
import { Field, Input, Textarea } from '@/components/ui/field'
import { ProblemNote } from '@/components/ui/problem'
import { toast } from '@/components/ui/toast'
import { api } from '@/lib/api'
import { fieldErrors, secretForm } from '@/lib/forms'
import { asApiError } from '@/lib/problem'
import { keys } from '@/lib/queries'

/** Sets a secret, or a new version of the one named. */
export function SecretDialog({ org, name: fixed, onClose, onSaved }: { org: string; name?: string; onClose: () => void; onSaved: (name: string) => void }) {
  const [name, setName] = useState(fixed ?? '')
  const [value, setValue] = useState('')
  const [shown, setShown] = useState(false)
  const [tried, setTried] = useState(false)
  const [busy, setBusy] = useState(false)
  const [error, setError] = useState<unknown>(null)
  const client = useQueryClient()
  const problems = fieldErrors(secretForm, { name, value })
  const refused = error === null ? undefined : asApiError(error)
  const save = async () => {
    setTried(true)
    if (Object.keys(problems).length > 0 || busy) return
    setBusy(true)
    setError(null)
    try {
      const saved = await api.setSecret(org, name, value)
      await client.invalidateQueries({ queryKey: keys.secrets(org) })
      toast.ok(`${name} is set`, `Version ${saved.version}. Releases made from now on use it.`)
      onSaved(name)
    } catch (e) {
      setError(e)
      setBusy(false)
    }
  }
  return (
    <Dialog
      open
      onOpenChange={(open) => {
        if (!open && !busy) onClose()
      }}
      title={fixed ? `New version of ${fixed}` : 'New secret'}
      description="Sealed under your organisation’s own key. Nobody can read it again, you included."
      footer={
        <>
          <Button onClick={onClose}>Cancel</Button>
          <Button variant="primary" busy={busy} onClick={() => void save()}>
            Set secret
          </Button>
        </>
      }
    >
      <form
        className="space-y-4"
        noValidate
        onSubmit={(event) => {
          event.preventDefault()
          void save()
        }}
      >
        {!fixed && (
          <Field label="Name" hint="As an environment variable, such as OPENAI_API_KEY" error={(tried ? problems.name : undefined) ?? refused?.field('/name')}>
            <Input value={name} onChange={(event) => setName(event.target.value)} maxLength={128} spellCheck={false} autoCapitalize="characters" autoComplete="off" className="font-mono" />
          </Field>
        )}
        <Field
          label="Value"
          error={(tried ? problems.value : undefined) ?? refused?.field('/value')}
          aside={
            <Button size="sm" variant="ghost" className="-my-1" onClick={() => setShown(!shown)}>
              {shown ? <EyeOff aria-hidden="true" /> : <Eye aria-hidden="true" />}
              {shown ? 'Hide' : 'Show'}
            </Button>
          }
        >
          {shown ? (
            <Textarea value={value} onChange={(event) => setValue(event.target.value)} spellCheck={false} autoComplete="off" className="font-mono text-xs!" />
          ) : (
            <Input type="password" value={value} onChange={(event) => setValue(event.target.value)} autoComplete="new-password" className="font-mono" />
          )}
        </Field>
        {refused && <ProblemNote error={refused} />}
        <button type="submit" hidden>
          Set secret
        </button>
      </form>
    </Dialog>
  )
}
