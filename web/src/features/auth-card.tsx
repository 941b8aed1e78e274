import type { ReactNode } from 'react'
import { Logo } from '@/components/logo'

/** The frame of the two pages a stranger sees. */
export function AuthCard({ title, lead, children, footer }: { title: string; lead: string; children: ReactNode; footer: ReactNode }) {
  return (
    <div className="relative flex min-h-dvh flex-col overflow-hidden">
      <div aria-hidden="true" className="pointer-events-none absolute inset-x-0 -top-72 mx-auto h-128 max-w-3xl rounded-full bg-accent opacity-[0.12] blur-[110px] dark:opacity-[0.07]" />
      <main className="relative mx-auto flex w-full max-w-[23rem] flex-1 flex-col justify-center px-5 py-12">
        <Logo className="mb-7 size-10" />
        <h1 tabIndex={-1} className="text-2xl font-semibold tracking-[-0.025em]">
          {title}
        </h1>
        <p className="mt-1.5 text-base text-muted">{lead}</p>
        <div className="mt-7">{children}</div>
        <p className="mt-6 text-sm text-muted">{footer}</p>
      </main>
    </div>
  )
}
