//! Weights made from the flat vector of parameters that training has, in memory that later parameters go to as well.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use moge_kernels::{Cpu, Elements, Isa, Matrix};

use crate::checkpoint::error::TensorProblem;
use crate::checkpoint::quant_scheme::QuantScheme;
use crate::checkpoint::storage::Storage;
use crate::network::config::ModelConfig;
use crate::network::tensors::{MatrixSpec, Part, TensorSource, TensorSpec, source_name};
use crate::network::weight::{Weight, pack, widen};
use crate::network::weights::{Network, Share, expected_tensors};

/// Tensors begin at cache lines, as packed ones must for speed.
const LINE_BYTES: usize = 64;

/// The memory of a network's tensors.
#[derive(Debug)]
pub(crate) struct ParamStore {
    /// Its scheme is the one to pack by.
    config: ModelConfig,
    /// In the order in which [`Network::build`] asks.
    tensors: Vec<StoredParam>,
    storage: Arc<Storage>,
    num_params: usize,
}

/// A tensor and its places.
#[derive(Debug)]
struct StoredParam {
    spec: TensorSpec,
    /// In the vector of parameters.
    params: Range<usize>,
    /// In the storage.
    bytes: Range<usize>,
}

impl ParamStore {
    /// Memory for the tensors of the network that `config` describes, packed as `scheme` says.
    ///
    /// # Errors
    /// If a weight has a width that its format does not allow.
    ///
    /// # Panics
    /// If `config` has a scheme of its own.
    pub(crate) fn new(config: &ModelConfig, scheme: QuantScheme) -> Result<ParamStore, TensorProblem> {
        assert!(config.quant.is_none(), "parameters are not quantised");
        let mut num_params = 0;
        let mut places = HashMap::new();
        for spec in expected_tensors(config) {
            let len = spec.num_elements() as usize;
            places.insert(spec.name, num_params..num_params + len);
            num_params += len;
        }
        let config = ModelConfig { quant: scheme, ..config.clone() };
        let mut num_bytes = 0usize;
        let mut tensors = Vec::new();
        for spec in expected_tensors(&config) {
            if let Some(problem) = spec.width_problem() {
                return Err(problem);
            }
            let params = places[source_name(&config, &spec.name)].clone();
            let start = num_bytes.next_multiple_of(LINE_BYTES);
            let unit = if spec.packed.is_some() { 1 } else { size_of::<f32>() };
            num_bytes = start + spec.stored_shape().iter().product::<usize>() * unit;
            tensors.push(StoredParam { spec, params, bytes: start..num_bytes });
        }
        let (storage, range) = Storage::aligned(num_bytes);
        for tensor in &mut tensors {
            tensor.bytes = range.start + tensor.bytes.start..range.start + tensor.bytes.end;
        }
        Ok(ParamStore { config, tensors, storage: Arc::new(storage), num_params })
    }

    /// The network's description, with its scheme.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Write the numbers of `params`, packed where the scheme says so.
    ///
    /// # Panics
    /// If `params` has another length, or a network that borrows the memory is alive.
    pub(crate) fn write(&mut self, cpu: &Cpu, params: &[f32]) {
        assert_eq!(params.len(), self.num_params, "parameters");
        let storage = Arc::get_mut(&mut self.storage).expect("no network borrows the memory");
        for StoredParam { spec, params: place, bytes } in &self.tensors {
            let numbers = &params[place.clone()];
            let out = &mut storage.bytes_mut()[bytes.clone()];
            match spec.packed {
                None => out.copy_from_slice(bytemuck::cast_slice(numbers)),
                Some(packed) => {
                    let weights = numbers.chunks_exact(packed.rows * packed.cols);
                    let len = packed.format.weight_bytes(packed.rows, packed.cols);
                    for (weight, out) in weights.zip(out.chunks_exact_mut(len)) {
                        pack(cpu, Matrix::new(Elements::F32(weight), packed.rows, packed.cols), packed.format, out);
                    }
                }
            }
        }
    }

    /// The network whose weights lie here.
    pub(crate) fn network(&self) -> Network {
        Network::build(&self.config, Share::WHOLE, &mut Stored { store: self, next: 0 })
    }
}

/// Hands out the tensors of a store in their order.
struct Stored<'a> {
    store: &'a ParamStore,
    next: usize,
}

impl Stored<'_> {
    fn next(&mut self, name: &str) -> &StoredParam {
        let tensor = &self.store.tensors[self.next];
        assert_eq!(tensor.spec.name, name, "the order of tensors");
        self.next += 1;
        tensor
    }
}

impl TensorSource for Stored<'_> {
    type Matrix = Weight;
    type Vector = Vec<f32>;

    fn matrix(&mut self, name: String, spec: &MatrixSpec) -> Weight {
        let format = self.store.config.quant.format(spec.role, spec.layer);
        let start = self.next(&name).bytes.start;
        Weight::from_memory(&self.store.storage, start, format, spec.rows, spec.cols)
    }

    fn halves(&mut self, name: String, spec: &MatrixSpec) -> [Weight; 2] {
        let format = self.store.config.quant.format(spec.role, spec.layer);
        let bytes = self.next(&name).bytes.clone();
        [bytes.start, bytes.start + bytes.len() / 2]
            .map(|start| Weight::from_memory(&self.store.storage, start, format, spec.rows, spec.cols))
    }

    fn vector(&mut self, name: String, shape: &[usize], _: &Part) -> Vec<f32> {
        let start = self.next(&name).bytes.start;
        let weight = Weight::from_memory(&self.store.storage, start, None, 1, shape.iter().product());
        widen(Isa::best(), weight.matrix().elements())
    }
}
