// Calls ExtractFeatures and Generate, knowing only the server's address: what the services look like is learnt from
// server reflection. Prints one JSON object.
//
//   node call_by_reflection.mjs ADDRESS DICTIONARY TEXT

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const OPTIONS = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };

// The reflection protocol itself (grpc.reflection.v1alpha), as much of it as is needed.
const REFLECTION = protoLoader.fromJSON({
  nested: { grpc: { nested: { reflection: { nested: { v1alpha: { nested: {
    ServerReflection: { methods: { ServerReflectionInfo: {
      requestType: "Request", requestStream: true, responseType: "Response", responseStream: true } } },
    Request: {
      oneofs: { message_request: { oneof: ["file_by_filename", "file_containing_symbol", "list_services"] } },
      fields: {
        file_by_filename: { type: "string", id: 3 },
        file_containing_symbol: { type: "string", id: 4 },
        list_services: { type: "string", id: 7 } } },
    Response: { fields: {
      file_descriptor_response: { type: "Files", id: 4 },
      list_services_response: { type: "Services", id: 6 },
      error_response: { type: "Failure", id: 7 } } },
    Files: { fields: { file_descriptor_proto: { rule: "repeated", type: "bytes", id: 1 } } },
    Services: { fields: { service: { rule: "repeated", type: "Service", id: 1 } } },
    Service: { fields: { name: { type: "string", id: 1 } } },
    Failure: { fields: { error_code: { type: "int32", id: 1 }, error_message: { type: "string", id: 2 } } },
  } } } } } } },
}, { keepCase: true });

// Asks one question and returns its answer.
function reflect(address, question) {
  const Client = grpc.makeClientConstructor(REFLECTION["grpc.reflection.v1alpha.ServerReflection"], "ServerReflection");
  const client = new Client(address, grpc.credentials.createInsecure());
  return new Promise((resolve, reject) => {
    const call = client.ServerReflectionInfo();
    call.on("data", (answer) => {
      if (answer.error_response) reject(new Error(answer.error_response.error_message));
      else resolve(answer);
    });
    call.on("error", reject);
    call.on("end", () => client.close());
    call.write(question);
    call.end();
  });
}

// Length-delimited protobuf fields of one number: what is needed to read a file's name (1) and dependencies (3), and to
// write the files as a FileDescriptorSet (1).
function* fields(bytes, wanted) {
  let at = 0;
  const varint = () => {
    let value = 0, scale = 1;
    for (;;) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
      scale *= 128;
    }
  };
  while (at < bytes.length) {
    const key = varint(), kind = key & 7;
    if (kind === 0) varint();
    else if (kind === 5) at += 4;
    else if (kind === 1) at += 8;
    else {
      const length = varint();
      if (key >> 3 === wanted) yield bytes.subarray(at, at + length);
      at += length;
    }
  }
}

function asSet(files) {
  return Buffer.concat(files.flatMap((file) => {
    const length = [];
    for (let left = file.length; ; left >>>= 7) {
      length.push(left > 127 ? (left & 127) | 128 : left);
      if (left <= 127) break;
    }
    return [Buffer.from([10, ...length]), file];
  }));
}

// The service of that name, with every file that its messages need, dependencies first.
async function load(address, name) {
  const files = new Map();
  async function add(question) {
    const answer = await reflect(address, question);
    for (const file of answer.file_descriptor_response.file_descriptor_proto) {
      const fileName = [...fields(file, 1)][0].toString();
      if (files.has(fileName)) continue;
      for (const dependency of fields(file, 3)) {
        if (!files.has(dependency.toString())) await add({ file_by_filename: dependency.toString() });
      }
      files.set(fileName, file);
    }
  }
  await add({ file_containing_symbol: name });
  const definition = protoLoader.loadFileDescriptorSetFromBuffer(asSet([...files.values()]), OPTIONS);
  const Client = grpc.makeClientConstructor(definition[name], name);
  return new Client(address, grpc.credentials.createInsecure());
}

const [address, dictionary, text] = process.argv.slice(2);
const listed = await reflect(address, { list_services: "" });

const features = await load(address, "saeserve.v1.FeatureService");
const extracted = await new Promise((resolve, reject) => features.ExtractFeatures(
  { inputs: [{ text }], dictionaries: [dictionary], include_tokens: true, selection: { top_k: 3 } },
  { deadline: Date.now() + 60_000 },
  (error, reply) => (error ? reject(error) : resolve(reply)),
));

const interventions = await load(address, "saeserve.v1.InterventionService");
const events = [];
const stream = interventions.Generate(
  {
    prompt: { text }, max_new_tokens: 8, ignore_end_of_text: true,
    edits: [{ dictionary, feature: 3, set: { value: 5 } }],
  },
  { deadline: Date.now() + 60_000 },
);
for await (const reply of stream) events.push(reply);

const [result] = extracted.results;
console.log(JSON.stringify({
  services: listed.list_services_response.service.map((service) => service.name),
  tokens: result.tokens.pieces.map((piece) => piece.toString()),
  row_splits: result.dictionaries[0].features.row_splits,
  indices: result.dictionaries[0].features.indices,
  values: result.dictionaries[0].features.values,
  generated_ids: events.flatMap((event) => event.chunk?.token_ids ?? []),
  finish: events.at(-1).finish.reason,
}));
features.close();
interventions.close();
