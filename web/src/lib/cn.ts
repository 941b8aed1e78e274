import { type ClassValue, clsx } from 'clsx'

/** Joins class names. Of two utilities for one property the style sheet decides, so an override is marked important (`h-10!`). */
export function cn(...inputs: ClassValue[]): string {
  return clsx(inputs)
}
