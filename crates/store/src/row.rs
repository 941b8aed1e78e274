//! Rows as values: ids, times, and readers that turn a bad column into [`StoreError::Corrupt`].

use chrono::{DateTime, Utc};
use clawhq_domain::Millis;
use sea_orm::{QueryResult, TryGetable, Value};
use uuid::Uuid;

use crate::error::{Result, StoreError};

/// A domain id as the database has it.
pub(crate) trait Id: Copy {
    fn from_uuid(uuid: Uuid) -> Self;
    fn uuid(self) -> Uuid;
    /// As a statement's parameter.
    fn value(self) -> Value {
        Value::Uuid(Some(self.uuid()))
    }
}

macro_rules! ids {
    ($($name:ident)+) => {$(
        impl Id for clawhq_domain::ids::$name {
            fn from_uuid(uuid: Uuid) -> Self {
                Self::from_u128(uuid.as_u128())
            }

            fn uuid(self) -> Uuid {
                Uuid::from_u128(self.as_u128())
            }
        }
    )+};
}
ids! { OrgId UserId SessionId ApiKeyId WorkloadId ReleaseId InstanceId SlotId NodeId VolumeId EventId SecretId JobId RequestId }

pub(crate) fn optional<I: Id>(id: Option<I>) -> Value {
    Value::Uuid(id.map(Id::uuid))
}

pub(crate) fn bytes(bytes: &[u8]) -> Value {
    Value::Bytes(Some(bytes.to_vec()))
}

pub(crate) fn json(value: serde_json::Value) -> Value {
    Value::Json(Some(Box::new(value)))
}

/// A list of ids as one parameter: read it with `select value::uuid from jsonb_array_elements_text($1)`.
pub(crate) fn id_list<I: Id>(ids: &[I]) -> Value {
    json(ids.iter().map(|id| id.uuid().to_string()).collect())
}

pub(crate) fn millis(time: DateTime<Utc>) -> Millis {
    time.timestamp_millis()
}

/// A row being read; it knows its table and id, so that what is unreadable can be found again.
pub(crate) struct Row<'a> {
    row: &'a QueryResult,
    table: &'static str,
    prefix: &'static str,
    id: String,
}

impl<'a> Row<'a> {
    /// `id` is the column that names the row.
    pub(crate) fn new(row: &'a QueryResult, table: &'static str, id: &'static str) -> Self {
        let id = row.try_get::<Uuid>("", id).map(|id| id.to_string()).unwrap_or_default();
        Self { row, table, prefix: "", id }
    }

    /// One of several rows that were joined: its columns' names begin with `prefix`, and its id is `<prefix>id`.
    pub(crate) fn prefixed(row: &'a QueryResult, table: &'static str, prefix: &'static str) -> Self {
        let id = row.try_get::<Uuid>(prefix, "id").map(|id| id.to_string()).unwrap_or_default();
        Self { row, table, prefix, id }
    }

    pub(crate) fn corrupt(&self, field: &'static str) -> StoreError {
        StoreError::corrupt(self.table, &self.id, field)
    }

    pub(crate) fn get<T: TryGetable>(&self, field: &'static str) -> Result<T> {
        self.row.try_get(self.prefix, field).map_err(|_| self.corrupt(field))
    }

    pub(crate) fn id<I: Id>(&self, field: &'static str) -> Result<I> {
        self.get::<Uuid>(field).map(I::from_uuid)
    }

    pub(crate) fn id_opt<I: Id>(&self, field: &'static str) -> Result<Option<I>> {
        Ok(self.get::<Option<Uuid>>(field)?.map(I::from_uuid))
    }

    pub(crate) fn millis(&self, field: &'static str) -> Result<Millis> {
        self.get::<DateTime<Utc>>(field).map(millis)
    }

    pub(crate) fn millis_opt(&self, field: &'static str) -> Result<Option<Millis>> {
        Ok(self.get::<Option<DateTime<Utc>>>(field)?.map(millis))
    }

    /// A count or size: never negative in the schema, so a negative one is corrupt.
    pub(crate) fn unsigned(&self, field: &'static str) -> Result<u32> {
        u32::try_from(self.get::<i32>(field)?).map_err(|_| self.corrupt(field))
    }

    /// Text that the domain parses.
    pub(crate) fn parse<T>(&self, field: &'static str, parse: impl FnOnce(&str) -> Option<T>) -> Result<T> {
        let text: String = self.get(field)?;
        parse(&text).ok_or_else(|| self.corrupt(field))
    }

    pub(crate) fn parse_opt<T>(&self, field: &'static str, parse: impl FnOnce(&str) -> Option<T>) -> Result<Option<T>> {
        match self.get::<Option<String>>(field)? {
            Some(text) => parse(&text).map(Some).ok_or_else(|| self.corrupt(field)),
            None => Ok(None),
        }
    }

    /// A JSON column in one of the store's own shapes.
    pub(crate) fn decode<T>(
        &self,
        field: &'static str,
        decode: impl FnOnce(serde_json::Value) -> Option<T>,
    ) -> Result<T> {
        decode(self.get(field)?).ok_or_else(|| self.corrupt(field))
    }

    pub(crate) fn decode_opt<T>(
        &self,
        field: &'static str,
        decode: impl FnOnce(serde_json::Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.get::<Option<serde_json::Value>>(field)? {
            Some(value) => decode(value).map(Some).ok_or_else(|| self.corrupt(field)),
            None => Ok(None),
        }
    }
}
