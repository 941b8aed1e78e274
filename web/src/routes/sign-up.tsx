import { useQueryClient } from '@tanstack/react-query'
import { createFileRoute, Link, useNavigate } from '@tanstack/react-router'
import { useState } from 'react'
import { Button } from '@/components/ui/button'
import { Field, Input } from '@/components/ui/field'
import { ProblemNote } from '@/components/ui/problem'
import { AuthCard } from '@/features/auth-card'
import { api } from '@/lib/api'
import { credentials, fieldErrors } from '@/lib/forms'
import { asApiError } from '@/lib/problem'
import { keys, meQuery } from '@/lib/queries'
import { homeOrg } from '@/lib/session'
import { useTitle } from '@/lib/title'

export const Route = createFileRoute('/sign-up')({ component: SignUp })

function SignUp() {
  useTitle('Sign up')
  const [email, setEmail] = useState('')
  const [password, setPassword] = useState('')
  const [tried, setTried] = useState(false)
  const [busy, setBusy] = useState(false)
  const [error, setError] = useState<unknown>(null)
  const client = useQueryClient()
  const navigate = useNavigate()
  const problems = fieldErrors(credentials, { email, password })
  const refused = error === null ? undefined : asApiError(error)

  const submit = async () => {
    setTried(true)
    if (Object.keys(problems).length > 0 || busy) return
    setBusy(true)
    setError(null)
    try {
      await api.signUp({ email: email.trim(), password })
      client.removeQueries({ queryKey: keys.me })
      const me = await client.fetchQuery(meQuery)
      const org = homeOrg(me)
      if (org) await navigate({ to: '/orgs/$org/deploy', params: { org: org.slug }, search: { first: true } })
      else await navigate({ to: '/' })
    } catch (e) {
      setError(e)
      setBusy(false)
    }
  }

  return (
    <AuthCard
      title="Create your account"
      lead="Your first agent runs a few milliseconds after you press Deploy. No card needed."
      footer={
        <>
          Already with us?{' '}
          <Link to="/sign-in" className="font-medium text-ink underline decoration-line-strong underline-offset-4 hover:decoration-ink">
            Sign in
          </Link>
        </>
      }
    >
      <form
        noValidate
        className="space-y-4"
        onSubmit={(event) => {
          event.preventDefault()
          void submit()
        }}
      >
        <Field label="E-mail" error={(tried ? problems.email : undefined) ?? refused?.field('/email')}>
          <Input type="email" name="email" autoComplete="username" autoFocus required value={email} onChange={(event) => setEmail(event.target.value)} className="h-10!" />
        </Field>
        <Field label="Password" hint="At least 8 characters. A few words in a row are easiest." error={(tried ? problems.password : undefined) ?? refused?.field('/password')}>
          <Input type="password" name="password" autoComplete="new-password" required value={password} onChange={(event) => setPassword(event.target.value)} className="h-10!" />
        </Field>
        {refused && <ProblemNote error={refused} />}
        <Button type="submit" variant="primary" size="lg" className="w-full" busy={busy}>
          Create account
        </Button>
      </form>
    </AuthCard>
  )
}
