// Streams an answer over gRPC:  java -cp ... Chat [HOST:PORT] [QUESTION]
// Generate the stubs with ./generate.sh or `buf generate ../../protos`; docs/clients.md says what that needs.

import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import java.util.concurrent.TimeUnit;
import trivium.chat.v1.Chat.ChatMessage;
import trivium.chat.v1.Chat.CompletionOptions;
import trivium.chat.v1.Chat.ContentPart;
import trivium.chat.v1.Chat.CreateChatCompletionRequest;
import trivium.chat.v1.Chat.Role;
import trivium.chat.v1.ChatServiceGrpc;
import trivium.chat.v1.ModelOuterClass.ListModelsRequest;
import trivium.chat.v1.ModelServiceGrpc;
import trivium.sampling.v1.Sampling.SamplingParams;

public class Chat {
  public static void main(String[] args) throws InterruptedException {
    var target = args.length > 0 ? args[0] : "127.0.0.1:50051";
    var question = args.length > 1 ? args[1] : "What is the capital of France?";
    var channel = ManagedChannelBuilder.forTarget(target).usePlaintext().build();
    try {
      ask(channel, question);
    } finally {
      channel.shutdownNow().awaitTermination(5, TimeUnit.SECONDS);
    }
  }

  static void ask(ManagedChannel channel, String question) {
    var models = ModelServiceGrpc.newBlockingStub(channel);
    var model = models.listModels(ListModelsRequest.getDefaultInstance()).getModels(0).getId();
    var text = ContentPart.newBuilder().setText(question);
    var request = CreateChatCompletionRequest.newBuilder()
        .setModel(model)
        .addMessages(ChatMessage.newBuilder().setRole(Role.ROLE_USER).addContent(text))
        .setOptions(CompletionOptions.newBuilder()
            .setSampling(SamplingParams.newBuilder().setTemperature(0))
            .setMaxCompletionTokens(100));
    var events = ChatServiceGrpc.newBlockingStub(channel).streamChatCompletion(request.build());
    events.forEachRemaining(event -> {
      System.out.print(event.getDelta().getContent());
      if (event.hasUsage()) {
        var usage = event.getUsage();
        System.out.printf("%n[%d + %d tokens, %.3f gpu_seconds]%n", usage.getPromptTokens(),
            usage.getCompletionTokens(), usage.getDeviceNanoseconds() / 1e9);
      }
    });
  }
}
