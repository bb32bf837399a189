//! `namespace()`, the only value of a template that outlives an iteration of a loop.
//!
//! The engine's own would hold anything, itself included, so that a loop could nest values without end; printing,
//! comparing or dropping them then overflows the stack, which ends the process. Ours holds plain data of limited depth.
//! The engine assigns to its own namespaces only, so `{% set ns.name = value %}` is rewritten to a call.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use minijinja::value::{Enumerator, Kwargs, Object, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::limits::MAX_DEPTH;

/// Items that are copied for one unit of fuel, which pays for 64 bytes.
const ITEMS_PER_FUEL: u64 = 2;

/// The name of the function that assignments are rewritten to.
pub(super) const ASSIGN: &str = "__assign";

#[derive(Debug, Default)]
struct Namespace {
    values: Mutex<BTreeMap<String, Value>>,
}

impl Namespace {
    fn values(&self) -> MutexGuard<'_, BTreeMap<String, Value>> {
        // Each call leaves the map consistent, so a panic elsewhere does not matter.
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Object for Namespace {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.values().get(key.as_str()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.values().keys().map(Value::from).collect())
    }
}

/// `namespace(name=value, ..)` or `namespace(mapping)`.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands over arguments by value")]
pub(super) fn namespace(state: &State, defaults: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let namespace = Namespace::default();
    if let Some(defaults) = defaults {
        for key in defaults.try_iter()?.checked() {
            let key = key?;
            namespace.values().insert(key.to_string(), plain_data(state, &defaults.get_item(&key)?)?);
        }
    }
    for name in kwargs.args() {
        namespace.values().insert(name.to_owned(), plain_data(state, &kwargs.get::<Value>(name)?)?);
    }
    Ok(Value::from_object(namespace))
}

/// `{% set namespace.name = value %}`.
pub(super) fn assign(state: &State, namespace: &Value, name: String, value: &Value) -> Result<(), Error> {
    let Some(namespace) = namespace.downcast_object_ref::<Namespace>() else {
        let problem = format!("can only assign to namespaces, not {}", namespace.kind());
        return Err(Error::new(ErrorKind::InvalidOperation, problem));
    };
    let value = plain_data(state, value)?;
    namespace.values().insert(name, value);
    Ok(())
}

/// A copy that holds nothing but data.
fn plain_data(state: &State, value: &Value) -> Result<Value, Error> {
    let mut num_items = 0;
    let copy = copy_data(state, value, 0, &mut num_items)?;
    state.consume_fuel(num_items / ITEMS_PER_FUEL)?;
    Ok(copy)
}

fn copy_data(state: &State, value: &Value, depth: usize, num_items: &mut u64) -> Result<Value, Error> {
    *num_items += 1;
    if num_items.is_multiple_of(ITEMS_PER_FUEL) {
        state.consume_fuel(1)?;
    }
    if depth > MAX_DEPTH {
        let problem = format!("a namespace cannot hold values nested deeper than {MAX_DEPTH}");
        return Err(Error::new(ErrorKind::InvalidOperation, problem));
    }
    let mut copy = |value: &Value| copy_data(state, value, depth + 1, num_items);
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter()?.checked().map(|item| copy(&item?)).collect::<Result<Value, Error>>()
        }
        ValueKind::Map if value.downcast_object_ref::<Namespace>().is_none() => {
            let pairs = value.try_iter()?.checked().map(|key| {
                let key = key?;
                let value = copy(&value.get_item(&key)?)?;
                Ok((key, value))
            });
            Ok(Value::from_pairs(pairs.collect::<Result<Vec<(Value, Value)>, Error>>()?))
        }
        ValueKind::Map | ValueKind::Plain => {
            let problem = "a namespace can hold data, not namespaces, macros and loops";
            Err(Error::new(ErrorKind::InvalidOperation, problem))
        }
        _ => Ok(value.clone()),
    }
}
