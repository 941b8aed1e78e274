import { Menu as Base } from '@base-ui/react/menu'
import { Check } from 'lucide-react'
import type { RefObject } from 'react'
import { cn } from '@/lib/cn'
import type { MenuEntry } from './menu'

const item =
  'flex w-full cursor-default items-center gap-2.5 rounded-md px-2 py-1.5 text-sm text-ink outline-none select-none data-highlighted:bg-hover data-disabled:opacity-45 [&>svg]:size-4 [&>svg]:shrink-0 pointer-coarse:py-2.5'

export default function MenuPopup(props: {
  open: boolean
  onOpenChange: (open: boolean) => void
  anchor: RefObject<HTMLButtonElement | null>
  labelledBy: string
  entries: MenuEntry[]
  align: 'start' | 'end'
  side: 'top' | 'bottom'
  width: string | undefined
}) {
  return (
    <Base.Root
      open={props.open}
      onOpenChange={(open, details) => {
        // A press of the button itself is the button's affair, or it would close here and open again there.
        const target = details.event.target
        if (!open && target instanceof Node && props.anchor.current?.contains(target) && details.event.type !== 'keydown') return
        props.onOpenChange(open)
      }}
    >
      {/* Inside the landmark or dialog of its button, so that it is no content without a home. */}
      <Base.Portal container={props.anchor.current?.closest<HTMLElement>('[role=dialog], aside, main') ?? document.body}>
        <Base.Positioner positionMethod="fixed" anchor={props.anchor} sideOffset={6} align={props.align} side={props.side} className="z-50 outline-none">
          <Base.Popup
            aria-labelledby={props.labelledBy}
            finalFocus={props.anchor}
            className={cn(
              'origin-(--transform-origin) rounded-xl border border-line bg-panel p-1 shadow-float outline-none transition-[opacity,scale] duration-100 data-ending-style:scale-[0.98] data-ending-style:opacity-0 data-starting-style:scale-[0.98] data-starting-style:opacity-0',
              props.width ?? 'min-w-48',
            )}
          >
            {props.entries.map((entry, index) => {
              if (entry.kind === 'separator') return <Base.Separator key={index} className="-mx-1 my-1 h-px bg-line" />
              if (entry.kind === 'item')
                return (
                  <Base.Item key={index} disabled={entry.disabled ?? false} onClick={entry.onSelect} className={cn(item, entry.danger ? 'text-bad-ink!' : '[&>svg]:text-muted')}>
                    {entry.icon}
                    {entry.label}
                  </Base.Item>
                )
              return (
                <Base.Group key={index}>
                  <Base.GroupLabel className="px-2 py-1.5 text-xs text-muted">{entry.label}</Base.GroupLabel>
                  <Base.RadioGroup value={entry.value} onValueChange={(value) => entry.onChange(String(value))}>
                    {entry.options.map((option) => (
                      <Base.RadioItem key={option.value} value={option.value} closeOnClick className={cn(item, '[&>svg]:text-muted')}>
                        {option.icon}
                        <span className="min-w-0 flex-1 truncate">{option.label}</span>
                        <Base.RadioItemIndicator>
                          <Check className="size-3.5 text-ink" aria-hidden="true" />
                        </Base.RadioItemIndicator>
                      </Base.RadioItem>
                    ))}
                  </Base.RadioGroup>
                </Base.Group>
              )
            })}
          </Base.Popup>
        </Base.Positioner>
      </Base.Portal>
    </Base.Root>
  )
}
