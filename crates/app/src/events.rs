//! The activity feed, as a list and as something to wait for.

use clawhq_domain::access::{Action, Noun};
use clawhq_domain::ids::WorkloadId;
use serde_json::json;
use tokio::sync::watch;

use crate::caller::OrgContext;
use crate::model::{Event, Page, PageRequest};
use crate::workloads::cursor;
use crate::{App, Result};

fn event(event: clawhq_store::Event) -> Event {
    Event {
        id: event.id,
        seq: event.seq,
        at: event.at,
        kind: event.kind,
        message: event.message,
        workload: event.workload,
        instance: event.instance,
        data: event.data,
    }
}

impl App {
    async fn workload_of(&self, context: &OrgContext, workload: Option<&str>) -> Result<Option<WorkloadId>> {
        match workload {
            Some(workload) => Ok(Some(self.find_workload(context, workload).await?.workload.id)),
            None => Ok(None),
        }
    }

    /// Newest first.
    pub async fn events(&self, context: &OrgContext, workload: Option<&str>, page: PageRequest) -> Result<Page<Event>> {
        context.may(Action::Read, Noun::Event)?;
        let workload = self.workload_of(context, workload).await?;
        let before = page.cursor.as_deref().map(cursor::read_number).transpose()?;
        let rows = self.store().tenant(&context.scope).events();
        let mut items = rows.list(workload, before, page.limit + 1).await?;
        let more = items.len() > page.limit as usize;
        items.truncate(page.limit as usize);
        let next_cursor = items.last().filter(|_| more).map(|last| cursor::write_number(last.seq));
        Ok(Page { items: items.into_iter().map(event).collect(), next_cursor })
    }

    /// Oldest first, those after `after`.
    pub async fn events_after(
        &self,
        context: &OrgContext,
        workload: Option<WorkloadId>,
        after: i64,
        limit: u32,
    ) -> Result<Vec<Event>> {
        context.may(Action::Read, Noun::Event)?;
        let events = self.store().tenant(&context.scope).events().after(workload, after, limit).await?;
        Ok(events.into_iter().map(event).collect())
    }

    /// The newest entry's number: where a stream without a resume point begins.
    pub async fn newest_event(&self, context: &OrgContext) -> Result<i64> {
        Ok(self.store().tenant(&context.scope).events().newest().await?)
    }

    /// Changes when there may be new entries. Take it before reading.
    pub fn event_wait(&self, context: &OrgContext) -> watch::Receiver<u64> {
        self.waiters().org(context.org)
    }

    /// Notes in the audit log that somebody entered a container or read from it.
    pub async fn audit_entry(
        &self,
        context: &OrgContext,
        action: &'static str,
        object: String,
        detail: serde_json::Value,
    ) -> Result<()> {
        let detail = if detail.is_object() { detail } else { json!({ "detail": detail }) };
        let change = clawhq_store::Change { audit: Some(context.audit(action, object, detail)), ..Default::default() };
        Ok(self.store().tenant(&context.scope).events().append(&change).await?)
    }
}
