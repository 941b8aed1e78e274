import { Menu as Base } from '@base-ui/react/menu'
import { Check } from 'lucide-react'
import type { ReactElement, ReactNode } from 'react'
import { cn } from '@/lib/cn'

const item =
  'flex w-full cursor-default items-center gap-2.5 rounded-md px-2 py-1.5 text-sm text-ink outline-none select-none data-highlighted:bg-hover data-disabled:opacity-45 [&>svg]:size-4 [&>svg]:shrink-0 [&>svg]:text-muted pointer-coarse:py-2.5'

export function Menu(props: { trigger: ReactElement<Record<string, unknown>>; children: ReactNode; align?: 'start' | 'end' | 'center'; side?: 'top' | 'bottom'; className?: string }) {
  return (
    <Base.Root>
      <Base.Trigger render={props.trigger} />
      <Base.Portal>
        <Base.Positioner sideOffset={6} align={props.align ?? 'end'} side={props.side ?? 'bottom'} className="z-50 outline-none">
          <Base.Popup
            className={cn(
              'min-w-48 origin-(--transform-origin) rounded-xl border border-line bg-panel p-1 shadow-float outline-none transition-[opacity,scale] duration-100 data-ending-style:scale-[0.98] data-ending-style:opacity-0 data-starting-style:scale-[0.98] data-starting-style:opacity-0',
              props.className,
            )}
          >
            {props.children}
          </Base.Popup>
        </Base.Positioner>
      </Base.Portal>
    </Base.Root>
  )
}

export function MenuItem(props: { onClick?: () => void; children: ReactNode; disabled?: boolean; danger?: boolean; render?: ReactElement<Record<string, unknown>> }) {
  return (
    <Base.Item
      {...(props.onClick ? { onClick: props.onClick } : {})}
      {...(props.render ? { render: props.render, nativeButton: false } : {})}
      disabled={props.disabled ?? false}
      className={cn(item, props.danger && 'text-bad-ink [&>svg]:text-bad-ink')}
    >
      {props.children}
    </Base.Item>
  )
}

export function MenuSeparator() {
  return <Base.Separator className="-mx-1 my-1 h-px bg-line" />
}

export function MenuLabel({ children }: { children: ReactNode }) {
  return <Base.GroupLabel className="px-2 py-1.5 text-xs text-muted">{children}</Base.GroupLabel>
}

export function MenuGroup({ label, children }: { label: ReactNode; children: ReactNode }) {
  return (
    <Base.Group>
      <MenuLabel>{label}</MenuLabel>
      {children}
    </Base.Group>
  )
}

export function MenuRadio(props: { label: ReactNode; value: string; onChange: (value: string) => void; options: { value: string; label: ReactNode; icon?: ReactNode }[] }) {
  return (
    <Base.Group>
      <MenuLabel>{props.label}</MenuLabel>
      <Base.RadioGroup value={props.value} onValueChange={(value) => props.onChange(String(value))}>
        {props.options.map((option) => (
          <Base.RadioItem key={option.value} value={option.value} className={item}>
            {option.icon}
            <span className="flex-1">{option.label}</span>
            <Base.RadioItemIndicator>
              <Check className="size-3.5 text-ink" aria-hidden="true" />
            </Base.RadioItemIndicator>
          </Base.RadioItem>
        ))}
      </Base.RadioGroup>
    </Base.Group>
  )
}
